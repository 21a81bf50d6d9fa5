// A third-party producer and receiver in JavaScript; see client.py.
import { createServer } from "node:http";
import { once } from "node:events";
import { randomBytes } from "node:crypto";
import { strict as assert } from "node:assert";
import { createRequire } from "node:module";

// The packages are in NODE_PATH, which `import` does not search.
const require = createRequire(`${process.env.NODE_PATH}/package.json`);
const { connect, headers: newHeaders } = require("@nats-io/transport-node");
const { Webhook } = require("standardwebhooks");

const PATIENCE = 30_000;
const { NATS_URL, PROJECT_ID, LEAD_ID, PORT, TRUSTED, FOREIGN } = process.env;
const [trusted, foreign] = [TRUSTED, FOREIGN].map((secrets) => secrets.split(" ").filter(Boolean));
setTimeout(() => assert.fail("it takes too long"), 2 * PATIENCE).unref();

const webhooks = new Map();
const receiver = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks).toString();
  webhooks.set(JSON.parse(body).updateId, { headers: request.headers, body });
  response.writeHead(204).end();
});
receiver.listen(Number(PORT), "127.0.0.1");
await once(receiver, "listening");

function verifies(secret, { headers, body }) {
  try {
    new Webhook(secret).verify(body, headers);
    return true;
  } catch {
    return false;
  }
}

async function until(what, found) {
  for (const end = Date.now() + PATIENCE; Date.now() < end; await new Promise((next) => setTimeout(next, 20))) {
    const value = found();
    if (value !== undefined) return value;
  }
  assert.fail(`there is no ${what}`);
}

const { host, username, password } = new URL(NATS_URL);
const nc = await connect({ servers: host, ...(username && { user: username, pass: password }) });
const events = new Map();
nc.subscribe(`leads.evt.${PROJECT_ID}.>`, {
  callback: (error, message) => {
    assert.ifError(error);
    events.set(message.json().updateId, message);
  },
});
await nc.flush();

// An update over NATS: its outcome, and its webhook.
async function roundTrip(number) {
  const updateId = Math.floor(Date.now() / 1000).toString(16).padStart(8, "0") + randomBytes(8).toString("hex");
  const update = { leadId: LEAD_ID, metadata: { javascript: number, text: "é" }, userId: "nats.js" };
  const headers = newHeaders();
  headers.set("Leadrelay-Update-Id", updateId);
  // The answer has the form of JetStream's ack.
  const ack = (await nc.request(`leads.cmd.${PROJECT_ID}.update`, JSON.stringify(update), { timeout: PATIENCE, headers })).json();
  assert.equal(ack.stream, "LEAD_COMMANDS", JSON.stringify(ack));
  const message = await until("event", () => events.get(updateId));
  const event = message.json();
  assert.match(message.subject, /\.update\.succeeded$/);
  assert.deepEqual([event.success, event.data.javascript, event.userId], [true, number, "nats.js"]);
  const webhook = await until("webhook", () => webhooks.get(updateId));
  const payload = JSON.parse(webhook.body);
  assert.deepEqual([payload.data, payload.leadId, payload.action_type], [event.data, LEAD_ID, "update"]);
  return webhook;
}

// New secrets take effect a moment after they are applied.
const end = Date.now() + PATIENCE;
for (let number = 1; ; number++) {
  const webhook = await roundTrip(number);
  const signatures = webhook.headers["webhook-signature"].split(" ");
  const wrong = [...trusted.filter((s) => !verifies(s, webhook)), ...foreign.filter((s) => verifies(s, webhook))];
  if (signatures.length === trusted.length && wrong.length === 0) {
    assert(!verifies(trusted[0], { ...webhook, body: `${webhook.body} ` }), "a body that was changed");
    console.log(`  @nats-io/transport-node, standardwebhooks (JavaScript): ${number} updates, ${signatures.length} signatures`);
    break;
  }
  assert(Date.now() < end, `${signatures.length} signatures, ${wrong.length} of the secrets are wrong`);
}
await nc.close();
receiver.close();
process.exit();
