// Keyboard shortcuts, the palette and live pages. Every page works without them.
"use strict";

// A live page: its stream sends the fragments that changed. A hidden page and a paused one have no stream.
const live = (() => {
  const control = document.getElementById("live");
  if (!control) return undefined;
  const [state, button] = control.children;
  // After this time without an event, the page says how old it is.
  const STALE_MS = 10_000;
  const RETRY_MS = 15_000;
  let source, retry;
  let isPaused = false;
  let isFinal = false;
  let receivedAt = Date.now();

  const show = (kind, text) => {
    state.className = `badge ${kind}`;
    state.textContent = text;
  };

  const parse = (html) => {
    const template = document.createElement("template");
    template.innerHTML = html;
    return template.content.firstElementChild;
  };

  const rowName = (tr) => tr?.querySelector("a")?.getAttribute("href") ?? tr?.cells[0]?.textContent;

  // The elements that have a focus, a scroll position, a tick or an open state. Each is named by its table, its row and
  // itself, and by its number among those of the same name.
  const elements = (fragment) => {
    const named = new Map();
    for (const element of fragment.querySelectorAll("a[href], button, input, select, textarea, summary, details, [tabindex]")) {
      const name = JSON.stringify([
        element.closest("[aria-label]")?.getAttribute("aria-label"),
        rowName(element.closest("tr")),
        element.tagName,
        ...["href", "name", "value"].map((attribute) => element.getAttribute(attribute)),
        element.matches("button, summary") ? element.textContent : element.querySelector("summary")?.textContent,
      ]);
      let number = 0;
      while (named.has(`${name} ${number}`)) number += 1;
      named.set(`${name} ${number}`, element);
    }
    return named;
  };

  // Places the new fragment, and keeps what the reader opened, scrolled, selected and focused in the old one.
  const replace = (old, next) => {
    const before = elements(old);
    const focused = document.activeElement;
    const scrolled = new Map(Array.from(before.values(), (element) => [element, element.scrollLeft]));
    old.replaceWith(next);
    for (const [name, element] of elements(next)) {
      const same = before.get(name);
      if (!same) continue;
      if (element.matches("details")) element.open = same.open;
      if (element.matches("[type=checkbox]")) element.checked = same.checked;
      if (scrolled.get(same) > 0) element.scrollLeft = scrolled.get(same);
      if (same === focused) element.focus({ preventScroll: true });
    }
  };

  // Rows that are shown change in their places, and leave when they left the list; new ones wait behind a button.
  const update = (old, next) => {
    const rows = (element) => new Map(Array.from(element.querySelectorAll("tbody tr"), (tr) => [rowName(tr), tr]));
    const [shown, current] = [rows(old), rows(next)];
    // A row that is absent from a page with a next page may be on that one.
    const isWhole = !next.querySelector("a[rel=next]");
    const isKept = (name) => current.has(name) || !isWhole;
    if (current.size === 0 || !Array.from(shown.keys()).some(isKept)) return replace(old, next);
    for (const [name, tr] of shown) {
      const changed = current.get(name)?.cloneNode(true);
      if (!isKept(name)) tr.remove();
      else if (changed && changed.innerHTML !== tr.innerHTML) replace(tr, changed);
    }
    const count = Array.from(current.keys()).filter((name) => !shown.has(name)).length;
    old.querySelector(".new")?.remove();
    if (count === 0) return;
    const pill = document.createElement("button");
    pill.type = "button";
    pill.className = "new";
    pill.textContent = `${count} new`;
    pill.addEventListener("click", () => {
      replace(old, next);
      // The button, which had the focus, is gone.
      next.querySelector("tbody a")?.focus({ preventScroll: true });
    });
    old.prepend(pill);
  };

  const receive = ({ data }) => {
    const { at, fragments, isFinal: isLast } = JSON.parse(data);
    receivedAt = Date.now();
    for (const next of fragments.map(parse)) {
      const old = document.querySelector(`[data-live="${CSS.escape(next.dataset.live)}"]`);
      if (!old || old.innerHTML === next.innerHTML) continue;
      if ("rows" in next.dataset) update(old, next);
      else replace(old, next);
    }
    const time = document.createElement("time");
    time.dateTime = at;
    time.textContent = at.slice(11, 19);
    document.getElementById("as-of").replaceChildren(time);
    show("good", "● live");
    if (!isLast) return;
    isFinal = true;
    close();
    show("off", "● final: this changes no more");
    button.hidden = true;
  };

  const close = () => {
    clearTimeout(retry);
    source?.close();
    source = undefined;
  };

  const open = () => {
    if (source || isPaused || isFinal || document.hidden) return;
    source = new EventSource(location.href);
    source.addEventListener("open", () => show("good", "● live"));
    source.addEventListener("message", receive);
    source.addEventListener("error", () => {
      if (source.readyState !== EventSource.CLOSED) return show("waiting", "○ reconnecting");
      // The server refused the stream: too many are open, or the session has ended.
      close();
      show("off", "○ not live: reload the page to see changes");
      retry = setTimeout(open, RETRY_MS);
    });
  };

  const toggle = () => {
    isPaused = !isPaused;
    button.setAttribute("aria-pressed", String(isPaused));
    if (!isPaused) return open();
    close();
    show("off", "○ paused");
  };

  setInterval(() => {
    const age = Date.now() - receivedAt;
    if (source && age > STALE_MS) show("bad", `○ stale for ${Math.round(age / 1000)} s`);
  }, 1000);
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  // A page that the browser kept for the way back has no stream.
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  button.addEventListener("click", toggle);
  show("waiting", "○ connecting");
  control.hidden = false;
  open();
  return { toggle };
})();

// Keys without Ctrl, which a switch in the list of keys turns off.
(() => {
  const keysSwitch = document.querySelector("#single-keys input");
  keysSwitch.checked = localStorage.getItem("singleKeys") !== "off";
  keysSwitch.addEventListener("change", () => localStorage.setItem("singleKeys", keysSwitch.checked ? "on" : "off"));
  document.getElementById("single-keys").hidden = false;

  let previous = "";
  let row = -1;

  const rows = () => Array.from(document.querySelectorAll("main tbody tr")).filter((tr) => tr.querySelector("a"));

  const select = (step) => {
    const all = rows();
    if (all.length === 0) return;
    all[row]?.classList.remove("current");
    row = Math.min(Math.max(row + step, 0), all.length - 1);
    all[row].classList.add("current");
    all[row].querySelector("a").focus();
  };

  const follow = (link) => link?.click();

  const act = (key) => {
    if (previous === "g") return follow(document.querySelector(`.sections a[data-key="${CSS.escape(key)}"]`));
    switch (key) {
      case "j": return select(1);
      case "k": return select(-1);
      case "]": return follow(document.querySelector("a[rel=next]"));
      case "[": return history.back();
      case ".": return live?.toggle();
      case "/": return document.getElementById("search")?.focus();
      case "?": {
        const keys = document.getElementById("keys");
        keys.open = !keys.open;
        return keys.scrollIntoView();
      }
    }
  };

  document.addEventListener("keydown", (event) => {
    if (!keysSwitch.checked || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) return;
    if (event.key === "/") event.preventDefault();
    act(event.key);
    previous = previous === "g" ? "" : event.key;
  });
})();

// The palette: Ctrl-K, then a page's name, or anything that has a page.
(() => {
  const dialog = document.getElementById("palette");
  if (!dialog) return;
  const input = dialog.querySelector("input");
  const all = Array.from(dialog.querySelectorAll("[role=option]"));
  const search = document.getElementById("palette-go");
  let selected = 0;

  const shown = () => all.filter((option) => !option.hidden);

  const select = (index) => {
    const options = shown();
    selected = options.length === 0 ? 0 : (index + options.length) % options.length;
    for (const option of all) option.setAttribute("aria-selected", String(option === options[selected]));
    input.setAttribute("aria-activedescendant", options[selected]?.id ?? "");
    options[selected]?.scrollIntoView({ block: "nearest" });
  };

  const filter = () => {
    const text = input.value.trim();
    for (const option of all) option.hidden = !option.textContent.toLowerCase().includes(text.toLowerCase());
    search.hidden = text === "";
    search.textContent = text === "" ? "" : `Go to “${text}”`;
    select(0);
  };

  const follow = (option) => {
    if (!option) return;
    const { href, go } = option.dataset;
    dialog.close();
    location.assign(href ?? go + encodeURIComponent(input.value.trim()));
  };

  document.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.altKey || event.shiftKey || event.key.toLowerCase() !== "k") return;
    event.preventDefault();
    if (dialog.open) return dialog.close();
    input.value = "";
    filter();
    dialog.showModal();
    input.focus();
  });
  input.addEventListener("input", filter);
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key !== "Enter" && !step) return;
    event.preventDefault();
    if (step) select(selected + step);
    else follow(shown()[selected]);
  });
  dialog.addEventListener("click", ({ target }) => {
    if (target === dialog) dialog.close();
    else follow(target.closest("[role=option]"));
  });
})();
