// Opens every page of the console in Chromium, in light and dark mode, at 375 px and 1280 px, with and without
// JavaScript. Checks that there is no error in the browser's console, no violation of axe's accessibility rules, and
// nothing wider than the screen. Then performs an operator's tasks by links, forms and keyboard. The environment is the
// stack.env of `leadctl up --demo`, and LEADCTL.
//
//    node console.mjs [--screenshots DIRECTORY]

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import http from "node:http";
import net from "node:net";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const {
  LEADCTL: leadctl,
  LEADRELAY_API_KEY: demoKey,
  LEADRELAY_CONSOLE_LOGIN_URL: loginUrl,
  LEADRELAY_CONSOLE_URL: console_,
  LEADRELAY_GATEWAY_URL: gateway,
  LEADRELAY_LEAD_ID: leadId,
  LEADRELAY_PROCESS_ID: processId,
  LEADRELAY_PROJECT_ID: projectId,
  NATS_URL: natsUrl,
} = process.env;
const directory = process.argv[2] === "--screenshots" ? process.argv[3] : undefined;
const project = `/p/${projectId}`;
const lead = `${project}/leads/${leadId}`;
const axe = fs.readFileSync(path.join(path.dirname(fileURLToPath(import.meta.url)), "node_modules/axe-core/axe.min.js"), "utf8");
// Generous: the machine may be busy with other things.
const TIMEOUT = 60_000;
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; " +
  "base-uri 'none'; frame-ancestors 'none'";

const createKey = (name, ...scopes) => {
  const args = ["key", "create", "--project", projectId, "--name", name, "--json"];
  const output = execFileSync(leadctl, [...args, ...scopes.flatMap((scope) => ["--scope", scope])], { encoding: "utf8" });
  return JSON.parse(output).apiKey;
};

const api = async (path, body, key = demoKey) => {
  const response = await fetch(gateway + path, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  assert.ok(response.ok, `${path}: ${response.status} ${await response.clone().text()}`);
  return response.json();
};

// Publishes a command to the log without the gateway's checks.
const log = (body) => new Promise((resolve, reject) => {
  const { hostname, port, username, password } = new URL(natsUrl);
  const login = JSON.stringify({ verbose: false, user: decodeURIComponent(username), pass: decodeURIComponent(password) });
  const lines = [`CONNECT ${login}`, `PUB leads.cmd.${projectId}.update ${body.length}`, body, "PING", ""];
  const socket = net.connect(Number(port), hostname, () => socket.write(lines.join("\r\n")));
  socket.on("data", (data) => {
    if (/-ERR/.test(data)) reject(new Error(String(data)));
    if (/PONG/.test(data)) socket.end(resolve);
  });
  socket.on("error", reject);
});

// Repeats until the condition holds.
const until = async (what, holds) => {
  for (const deadline = Date.now() + TIMEOUT; Date.now() < deadline; ) {
    if (await holds()) return;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.fail(`not within ${TIMEOUT} ms: ${what}`);
};

// The endpoint of a callback, which is down for a while.
let isDown = true;
const endpoint = http.createServer((request, response) => {
  request.resume();
  response.writeHead(isDown ? 503 : 204).end(isDown ? "down for maintenance" : undefined);
});
await new Promise((resolve) => endpoint.listen(0, "127.0.0.1", resolve));

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  timeout: TIMEOUT,
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
  ],
});

// Pages of all contexts add their errors here.
const errors = [];
const open = async (context) => {
  context.setDefaultTimeout(TIMEOUT);
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && errors.push(`${page.url()}: ${message.text()}`));
  page.on("pageerror", (error) => errors.push(`${page.url()}: ${error}`));
  return page;
};

const go = async (page, to) => {
  const response = await page.goto(console_ + to);
  assert.equal(response.status(), 200, to);
  assert.equal(response.headers()["content-security-policy"], POLICY, to);
};

// The path of the first link that a selector selects on a page.
const linkOn = async (page, on, selector) => {
  await go(page, on);
  return page.locator(selector).first().getAttribute("href");
};

const allPages = async (page) => {
  const delivery = await linkOn(page, `${project}/deliveries?lead=${leadId}`, "td a[href*='/deliveries/']");
  const id = delivery.split("/").pop();
  const callback = await linkOn(page, `${project}/callbacks`, "td a[href*='/callbacks/']");
  const update = await linkOn(page, lead, "td a[href*='/updates/']");
  const revoke = await linkOn(page, `${project}/keys`, "td a[href$='/revoke']");
  const process_ = await linkOn(page, `${project}/processes`, "td a[href*='/processes/']");
  return [
    "/", "/system", project, `${project}?range=1h`, `${project}/leads`, `${project}/leads?state=none`, lead, `${lead}/update`, update, `${project}/calls`,
    `${project}/updates`, `${project}/updates?status=failed&code=none`, `${lead}/end-call`, `${project}/deliveries`, `${project}/deliveries?status=exhausted`, delivery, `${delivery}/redeliver`,
    `${project}/deliveries/redeliver?delivery=${id}`, `${project}/callbacks`, callback, `${callback}/test`, `${callback}/enable`,
    `${callback}/pause`, `${callback}/resume`, `${callback}/recover`, `${callback}/backfill`, `${callback}/rotate-secret`, `${callback}/share`,
    `${project}/processes`, process_, `${process_}/edit`, `${process_}/share`, `${project}/keys`, revoke,
  ];
};

const check = async (page, where) => {
  for (const width of [375, 1280]) {
    await page.setViewportSize({ width, height: 800 });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
    assert.ok(!wide, `${where} is wider than ${width} px`);
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      const { violations } = await page.evaluate("axe.run({ resultTypes: ['violations'] })");
      const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`);
      assert.deepEqual(found, [], `${where} at ${width} px, ${colorScheme}`);
    }
  }
};

const checkAll = async (page, pages) => {
  for (const to of pages) {
    await go(page, to);
    await page.evaluate(axe);
    await check(page, to);
  }
};

// The tasks that an operator performs in three clicks. Each starts on the first page.

// Finds a lead by its id, opens its last update and a delivery, and sends the delivery again.
const redeliver = async (page) => {
  await go(page, project);
  await page.fill("#search", leadId);
  await page.press("#search", "Enter");
  await page.waitForURL(`**/leads/${leadId}`);
  await page.locator("section:has(h2:text-is('Updates')) td a[href*='/updates/']").last().click();
  await page.locator("h3 a[href*='/deliveries/']").first().click();
  const attempts = await page.locator("tbody tr").count();
  await page.click(".actions >> text=Redeliver");
  await page.click("main button:text-is('Redeliver')");
  await page.waitForURL("**/deliveries/*-*");
  await until("the delivery is repeated", async () => {
    await page.reload();
    return (await page.locator("tbody tr").count()) > attempts;
  });
};

// Selects deliveries in their list.
const redeliverSelected = async (page) => {
  await go(page, `${project}/deliveries?status=delivered`);
  const boxes = page.locator("input[name=delivery]");
  await boxes.nth(0).check();
  await boxes.nth(1).check();
  await page.click("text=Redeliver the selected deliveries");
  await page.click("main button:text-is('Redeliver 2')");
  await page.locator("text=2 of 2 are sent again.").waitFor();
};

// Finds the responses of a failing callback's endpoint, and checks whether the endpoint is repaired.
const failingCallback = async (page) => {
  isDown = true;
  await api("/api/v1/leads/update", { leadId, metadata: { seen: Date.now() } });
  await go(page, `${project}/callbacks`);
  await page.click("td a:text-is('billing')");
  const callback = page.url();
  const delivery = page.locator("section:has(h2:text-is('Pending deliveries')) tr:has-text('503') a[href*='/deliveries/']");
  await until("the delivery fails", async () => {
    await page.reload();
    return delivery.count();
  });
  await delivery.first().click();
  await page.locator("summary:text-is('First bytes')").first().click();
  await page.locator("pre:text-is('down for maintenance')").first().waitFor();
  isDown = false;
  await page.goto(callback);
  await page.click("text=Send a test");
  await page.click("main button:text-is('Send a test')");
  await page.locator("dd .badge:has-text('accepted')").waitFor();
};

// Rotates the secret of a callback.
const rotateSecret = async (page) => {
  await go(page, `${project}/callbacks`);
  await page.click("td a:text-is('analytics')");
  await page.click("text=Rotate the secret");
  await page.click("main button:text-is('Rotate the secret')");
  assert.match(await page.locator("main pre").first().textContent(), /whsec_/);
};

// Revokes a key that leaked: no request with it is accepted any more.
const revokeKey = async (page) => {
  const name = `leaked-${Date.now()}`;
  const key = createKey(name, "leads:read");
  await go(page, project);
  await page.click(".sections >> text=API keys");
  await page.locator(`tr:has(td:text-is('${name}')) >> text=Revoke`).click();
  await page.click("main button:text-is('Revoke the key')");
  await page.locator(`tr:has(td:text-is('${name}')) .badge:has-text('revoked')`).waitFor();
  await until("the gateway refuses the key", async () => {
    const response = await fetch(`${gateway}/api/v1/leads`, { headers: { authorization: `Bearer ${key}` } });
    return response.status === 401;
  });
};

// Shows how many deliveries of a callback would be sent again, and then sends them.
const recover = async (page) => {
  await go(page, `${project}/callbacks`);
  await page.click("td a:text-is('crm')");
  await page.click("text=Recover deliveries");
  await page.selectOption("#status", "delivered");
  await page.click("text=Count");
  const button = page.locator("main button:has-text('Redeliver ')");
  const count = Number((await button.textContent()).match(/\d+/)[0]);
  assert.ok(count > 0, "no delivery is counted");
  await button.click();
  assert.match(await page.locator("main dl").textContent(), new RegExp(`${count} deliveries`));
};

// Previews a change of a process, and then makes exactly that change.
const editProcess = async (page) => {
  const path = await linkOn(page, `${project}/processes`, `td a[href$='${processId}']`);
  await go(page, path);
  await page.click(".actions >> text=Edit");
  const rules = JSON.parse(await page.inputValue("#text"));
  rules.callTimeoutSeconds += 1;
  await page.fill("#text", JSON.stringify(rules));
  await page.click("text=Show the changes");
  await page.locator(`ins:has-text('"callTimeoutSeconds": ${rules.callTimeoutSeconds}')`).waitFor();
  if (page.context() === context) {
    await page.evaluate(axe);
    await check(page, "the changes of a process");
  }
  await page.click("main button:text-is('Apply')");
  await page.waitForURL(`**${path}`);
};

// Corrects a dead letter and sends it again.
const replayDeadLetter = async (page) => {
  const body = `{"leadId":"${leadId}","metadata":{"seen":${Date.now()}}`;
  await log(body);
  const letter = page.locator("tr:has-text('not replayed') a[href*='/dead-letters/']");
  await until("the letter is listed", async () => {
    await go(page, "/system");
    return letter.count();
  });
  const checked = async (what) => {
    if (page.context() !== context) return;
    await page.evaluate(axe);
    await check(page, what);
  };
  await letter.first().click();
  await checked("a dead letter");
  await page.click("text=Replay it, perhaps corrected");
  await checked("the replay of a dead letter");
  await page.fill("#body", `${body}}`);
  await page.click("main button:text-is('Replay')");
  await page.waitForURL("**/updates/*");
  await page.locator("dd .badge:has-text('succeeded')").waitFor();
};

// Follows a spike of failed updates to the code, its updates, and the reason of one failure.
const refusals = async (page) => {
  await go(page, project);
  await page.click(".sections >> text=Updates");
  await page.click(".tabs a:has-text('call_in_progress')");
  await page.locator("td a[href*='/updates/']").first().click();
  await page.locator("dd:has-text('Lead update is not allowed while a call is in progress')").waitFor();
};

// Finds a lead by its phone number.
const phone = async (page) => {
  await go(page, lead);
  const name = await page.locator("h1").textContent();
  const number = (await page.locator("details.reveal").first().textContent()).match(/\+\d+/)[0];
  await page.fill("#search", number);
  await page.press("#search", "Enter");
  await page.waitForURL("**/leads?q=*");
  await page.click(`td a:text-is('${name}')`);
  await page.waitForURL("**/leads/*");
};

// Lists the recent updates of an API key.
const sentByKey = async (page) => {
  await go(page, project);
  await page.click(".sections >> text=API keys");
  await page.locator("tr:has-text('demo') a:text-is('Updates'), tr:has(td:text-is('demo')) a:text-is('Updates')").first().click();
  await page.waitForURL("**/updates?key=*");
  await page.locator("td a[href*='/updates/']").first().waitFor();
};

// Ends a call whose end was not reported.
const endCall = async (page) => {
  await api("/api/v1/calls/started", { leadId, callId: "stuck" });
  await until("the call is listed", async () => {
    await go(page, `${project}/calls`);
    return page.locator("td:text-is('stuck')").count();
  });
  await page.locator("tr:has(td:text-is('stuck')) >> text=End the call").click();
  await page.click("main button:text-is('End the call')");
  await page.waitForURL("**/updates/*");
  await until("the call ends", async () => {
    await go(page, `${project}/calls`);
    return !(await page.locator("td:text-is('stuck')").count());
  });
};

// Previews and sends an update to a lead.
const update = async (page, color) => {
  await go(page, lead);
  await page.click("text=Send an update");
  await page.fill("#metadata", JSON.stringify({ color }));
  await page.click("main button:text-is('Preview')");
  await page.locator(`td code:text-is('"${color}"')`).waitFor();
  await page.click("text=Send the update");
  await page.waitForURL("**/updates/*");
  await until("the update succeeds", async () => {
    await page.reload();
    return page.locator("dd .badge:has-text('succeeded')").count();
  });
};

// Finds the reason why an update of the lead failed.
const refusal = async (page) => {
  await go(page, lead);
  await page.locator("tr:has(.badge.bad) a[href*='/updates/']").first().click();
  await page.locator("dd:has-text('Lead update is not allowed while a call is in progress')").waitFor();
};

const tasks = { redeliver, redeliverSelected, failingCallback, rotateSecret, revokeKey, recover, editProcess, replayDeadLetter, endCall, refusal, refusals, phone, sentByKey };

const keyboard = async (page) => {
  await go(page, project);
  await page.keyboard.press("g");
  await page.keyboard.press("l");
  await page.waitForURL(`**${project}/leads`);
  await page.keyboard.press("j");
  assert.match(await page.evaluate(() => document.activeElement.getAttribute("href")), /\/leads\//);
  const searched = async () => {
    await page.keyboard.press("/");
    return (await page.evaluate(() => document.activeElement.id)) === "search";
  };
  assert.ok(await searched());
  // The switch turns off shortcuts without Ctrl, also on the pages opened later.
  for (const use of [false, true]) {
    await go(page, project);
    await page.click("#keys summary");
    await page.setChecked("#single-keys input", use);
    await go(page, project);
    assert.equal(await searched(), use);
  }
};

// Ctrl-K and Cmd-K: opens a page by its name, with arrows and with a click; opens an id; closes with Esc.
const palette = async (page) => {
  const opened = async (keys = "Control+k") => {
    await page.keyboard.press(keys);
    await page.locator("#palette[open]").waitFor();
  };
  await go(page, project);
  await opened();
  await page.evaluate(axe);
  await check(page, "the palette");
  await page.keyboard.type("UPD");
  assert.deepEqual(await page.locator("#palette li:visible").allTextContents(), ["Updates", "Go to “UPD”"]);
  await page.keyboard.press("Enter");
  await page.waitForURL(`**${project}/updates`);
  await opened("Meta+k");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowUp");
  assert.equal(await page.locator("#palette li[aria-selected=true]").textContent(), "Leads");
  await page.keyboard.press("Enter");
  await page.waitForURL(`**${project}/leads`);
  await page.focus("#search");
  await opened();
  await page.keyboard.type("not an id");
  await page.keyboard.press("Escape");
  await page.locator("#palette:not([open])").waitFor({ state: "attached" });
  assert.equal(await page.evaluate(() => document.activeElement.id), "search");
  await opened();
  assert.equal(await page.inputValue("#palette-text"), "");
  await page.keyboard.type(leadId);
  await page.keyboard.press("Enter");
  await page.waitForURL(`**${lead}`);
  await opened();
  await page.click("#palette li:text-is('System')");
  await page.waitForURL("**/system");
  await opened();
  await page.keyboard.type(leadId);
  await page.keyboard.press("Enter");
  await page.waitForURL(`**${lead}`);
  await page.keyboard.press("?");
  await page.locator("#keys[open] dd:has-text('Go to a page by its name')").waitFor();
};

// The number of updates on the board, without a reload of the page.
const updatesOnBoard = (page) =>
  page.locator("section:has(h2:text-is('Updates in the last 24 hours')) tbody tr").first().textContent();

// The numbers at the top of the board, and their links.
const numbers = async (page) => {
  const fact = (name) => page.locator(`dt:text-is('${name}') + dd`);
  await go(page, `${project}?range=1h`);
  for (const name of ["Apply lag", "Announce lag"]) assert.match(await fact(name).textContent(), /^\d+(\.\d)? (ms|s|min)/, name);
  for (const [name, list] of [["Accepted and applied", "updates?from="], ["Succeeded", "updates?status=succeeded"], ["Delivered", "deliveries?status=delivered"]]) {
    await go(page, `${project}?range=1h`);
    assert.match(await fact(name).textContent(), /^\d.* per second$|^less than/, name);
    await fact(name).locator("a").click();
    await page.waitForURL((url) => url.href.includes(list));
    assert.ok(await page.locator("main tbody tr").count(), `${name}: no rows`);
  }
  await go(page, `${project}?range=1h`);
  execFileSync(leadctl, ["audit"], { stdio: "ignore" });
  await until("the last audit is shown", async () => /clean, \d+ updates checked/.test(await fact("Last audit").textContent()));
  await fact("Oldest pending delivery").locator("a").click();
  await page.waitForURL("**/deliveries?status=pending*");
  await page.goBack();
  await page.locator("section:has(h2:text-is('Deliveries in the last hour')) tbody tr").nth(1).locator("a").click();
  await page.waitForURL("**/deliveries?since=*until=*");
  assert.ok(await page.locator("main tbody tr").count(), "no deliveries of the minute");
};

// A live page updates itself, unless it is paused or hidden. After that it catches up.
const live = async (page, context) => {
  const change = () => api("/api/v1/leads/update", { leadId, metadata: { seen: Date.now() } });
  const witness = await open(context);
  const changesOn = async (watched, before) => until("the board changes", async () => (await updatesOnBoard(watched)) !== before);
  const hide = (hidden) => page.evaluate((hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
  }, hidden);
  await go(witness, project);
  await go(page, project);
  await page.locator("#live .badge:text-is('● live')").waitFor();
  const pauses = [
    [() => page.keyboard.press("."), () => page.click("#live button")],
    [() => hide(true), () => hide(false)],
  ];
  for (const [stop, resume] of [[undefined, undefined], ...pauses]) {
    const before = await updatesOnBoard(page);
    await until("both boards are equal", async () => (await updatesOnBoard(witness)) === before);
    await stop?.();
    await change();
    await changesOn(witness, before);
    if (stop) assert.equal(await updatesOnBoard(page), before);
    await resume?.();
    await changesOn(page, before);
  }
  await page.evaluate(axe);
  await check(page, "the live board");

  // New rows of a list wait for a click.
  await go(page, `${project}/updates`);
  await page.locator("#live .badge:text-is('● live')").waitFor();
  const rows = await page.locator("main tbody tr").count();
  await change();
  await page.locator("button.new:text-is('1 new')").waitFor();
  assert.equal(await page.locator("main tbody tr").count(), rows);
  await page.click("button.new");
  assert.equal(await page.locator("main tbody tr").count(), rows + 1);

  // New rows change neither the selection nor the focus.
  await go(page, `${project}/deliveries`);
  await page.locator("#live .badge:text-is('● live')").waitFor();
  const value = await page.locator("input[name=delivery]").first().getAttribute("value");
  const box = page.locator(`input[value='${value}']`);
  await box.check();
  await change();
  await page.locator("button.new").click();
  assert.ok(await box.isChecked(), "the selection is lost");
  assert.ok(await page.evaluate(() => document.activeElement.closest("tbody")), "the focus is lost");
  await go(page, project);
  await page.locator("#live .badge:text-is('● live')").waitFor();
  const before = await updatesOnBoard(page);
  await page.locator("section:has(h2:text-is('Updates in the last 24 hours')) .scroll").focus();
  await change();
  await changesOn(page, before);
  assert.match(await page.evaluate(() => document.activeElement.className), /scroll/);
  await witness.close();
};

const screenshots = async (page, timeline) => {
  fs.mkdirSync(directory, { recursive: true });
  await until("the callback fails", async () => {
    await go(page, project);
    return page.locator("td a:text-is('billing')").count();
  });
  for (const [name, to, width, schemes] of [["board", project, 1280, ["light"]], ["timeline", timeline, 1000, ["light", "dark"]]]) {
    await page.setViewportSize({ width, height: 900 });
    for (const colorScheme of schemes) {
      await page.emulateMedia({ colorScheme });
      await go(page, to);
      await page.screenshot({ path: path.join(directory, `console-${name}-${colorScheme}.png`) });
    }
  }
};

// An operator, who adds a key to act with.
const context = await browser.newContext({ reducedMotion: "reduce" });
const page = await open(context);
const operatorKey = createKey("operator", "leads:read", "leads:write", "calls:write", "config:read", "config:write");
await page.goto(loginUrl);
await page.evaluate(axe);
await check(page, "the login");
await page.click("main button");
await page.waitForURL(`${console_}/`);
await api("/api/v1/calls/started", { leadId, callId: "shown", timeoutSeconds: 3600 });
await until("the call is in progress", async () => {
  await go(page, `${project}/calls`);
  return page.locator("td:text-is('shown')").count();
});
const { port } = endpoint.address();
await api(`/api/v1/processes/${processId}/callbacks`, { name: "billing", url: `http://127.0.0.1:${port}/` }, operatorKey);
// Refused, because the process of the demo refuses updates during calls.
await api("/api/v1/leads/update", { leadId, metadata: { color: "red" } });
await until("the refused update is announced", async () => {
  await go(page, lead);
  await page.locator("tr:has(.badge.bad) a[href*='/updates/']").first().click({ timeout: 5_000 }).catch(() => {});
  return page.locator("h3 a[href*='/deliveries/']").count();
});
const pages = await allPages(page);
const [timeline] = pages.filter((to) => to.includes("/updates/"));
if (directory) await screenshots(page, timeline);
// Without a key, pages of actions ask for one.
await go(page, `${lead}/update`);
await page.evaluate(axe);
await check(page, "the form for a key");
await page.fill("#api_key", operatorKey);
await page.click("text=Use this key");
await page.waitForURL(`**${lead}/update`);
assert.match(await page.locator(".account").textContent(), /operator with key operator/);
await checkAll(page, pages);
await api("/api/v1/calls/ended", { leadId, callId: "shown" });
for (const task of Object.values(tasks)) await task(page);
await update(page, "teal");
await keyboard(page);
await palette(page);
await numbers(page);
await live(page, context);

// The same tasks without JavaScript.
const plain = await browser.newContext({ javaScriptEnabled: false, storageState: await context.storageState() });
const plainPage = await open(plain);
for (const to of pages.filter((to) => !to.endsWith("/end-call"))) await go(plainPage, to);
for (const task of Object.values(tasks)) await task(plainPage);
await update(plainPage, "plum");

// A tenant whose key may only read.
const tenant = await browser.newContext();
const tenantPage = await open(tenant);
await tenantPage.goto(`${console_}/login`);
await tenantPage.fill("#api_key", createKey("viewer", "leads:read", "config:read"));
await tenantPage.click("main button");
await tenantPage.waitForURL(`**${project}`);
await go(tenantPage, `${lead}/update`);
await tenantPage.locator("text=needs an API key of this project with the scope leads:write").waitFor();

// A viewer sees every page without actions. The pages of actions explain why they are refused.
const viewer = await open(await browser.newContext());
await viewer.goto(execFileSync(leadctl, ["console", "token", "--role", "viewer", "--url", console_], { encoding: "utf8" }).trim());
await viewer.evaluate(axe);
await check(viewer, "the login of a viewer");
await viewer.click("main button");
await viewer.waitForURL(`${console_}/`);
assert.equal(await viewer.locator(".account span").textContent(), "viewer");
const isAction = (to) => /\/(update|end-call|redeliver|test|enable|pause|resume|recover|backfill|rotate-secret|edit|revoke)(\?|$)/.test(to);
for (const to of pages.filter((to) => !isAction(to))) {
  await go(viewer, to);
  assert.equal(await viewer.locator("form[method=post]").count(), 1, `${to} has a form besides the one that signs out`);
}
assert.equal((await viewer.request.get(`${console_}${lead}/update`)).status(), 403);
await go(viewer, "/system");
await viewer.evaluate(axe);
await check(viewer, "the system, for a viewer");

// A visitor of a portal link opens the pages of one callback, and performs an action.
await go(page, `${project}/callbacks`);
await page.click("td a:text-is('crm')");
await page.click(".actions >> text=Share");
await page.check("input[name=act]");
await page.click("text=Make a link");
const shared = await page.locator("main pre").textContent();
for (const javaScriptEnabled of [true, false]) {
  const outside = await browser.newContext({ javaScriptEnabled });
  const visitor = await open(outside);
  const checked = async (where) => {
    if (!javaScriptEnabled) return;
    await visitor.evaluate(axe);
    await check(visitor, where);
  };
  await visitor.goto(shared);
  await checked("the form of a portal link");
  await visitor.click("main button");
  await visitor.waitForURL("**/portal/callbacks/*");
  await checked("the callback of a portal link");
  assert.equal((await visitor.request.get(console_ + project)).status(), 404);
  await visitor.click("text=Send a test");
  await checked("the test of a portal link");
  await visitor.click("main button:text-is('Send a test')");
  await visitor.locator("dd .badge:has-text('accepted')").waitFor();
  await visitor.click("text=Back to the callback");
  await visitor.locator("tr:has(.badge.good) a[href*='/portal/deliveries/']").first().click();
  await checked("the delivery of a portal link");
}
// The maker revokes the link in the list.
await go(page, `${project}/callbacks`);
await page.click("td a:text-is('crm')");
await page.click(".actions >> text=Share");
await page.evaluate(axe);
await check(page, "the open portal links");
await page.locator("section:has(h2:text-is('Open links of the project')) tr:has-text('test, redeliver') button").click();
await page.locator("[role=status]:has-text('is revoked')").waitFor();
await page.locator("section:has(h2:text-is('Open links of the project')) p:text-is('None.')").waitFor();

assert.deepEqual(errors, []);
await browser.close();
endpoint.closeAllConnections();
endpoint.close();
const count = pages.length + 11;
console.log(`${count} pages without an error or violation; ${2 * (Object.keys(tasks).length + 1)} tasks done, half without JavaScript`);
