// Keyboard shortcuts. Every page works without them.
"use strict";
(() => {
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
      case "/": return document.getElementById("search")?.focus();
      case "?": {
        const keys = document.getElementById("keys");
        keys.open = !keys.open;
        return keys.scrollIntoView();
      }
    }
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "/") event.preventDefault();
    act(event.key);
    previous = previous === "g" ? "" : event.key;
  });
})();
