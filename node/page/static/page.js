/* The page is whole without this file. It asks the node every few seconds whether something changed and exchanges the parts that did,
   never a card under a finger; it saves a tap without leaving the page, and says so when the node cannot be reached. */
"use strict";
(() => {
  const ASK_MS = 3000, PATIENCE_MS = 10000, FRESH_MS = 60000; // between questions; for an answer; until ages and checks are told anew
  const line = document.getElementById("line");
  if (!line) return;
  let busy = false, heard = Date.now(), fresh = Date.now();

  const clock = () => new Date(heard).toLocaleTimeString(document.documentElement.lang, { hour: "2-digit", minute: "2-digit" });
  function say(on) {
    const told = on ? line.dataset.on : line.dataset.cut.replace("{time}", clock());
    if (line.textContent !== told) line.textContent = told;
    line.classList.toggle("cut", !on);
  }
  const get = (url, more) => fetch(url, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS), ...more });

  function address() {
    const url = new URL(location.href), card = document.querySelector("[data-card]");
    url.hash = "";
    if (card && !url.searchParams.has("answer")) url.searchParams.set("keep", card.dataset.card);
    return url;
  }

  async function show(answer, { card }) {
    if (new URL(answer.url).pathname === "/login") { location.assign("/login"); return; }
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const mark = page.getElementById("line");
    if (!mark) return;
    line.dataset.mark = mark.dataset.mark;
    for (const part of page.querySelectorAll("[data-live]")) {
      const old = document.getElementById(part.id);
      if (old && (card || part.id !== "check" || part.dataset.card !== old.dataset.card || part.textContent !== old.textContent)) swap(old, part, card);
    }
    fresh = Date.now();
  }

  function swap(old, part, force) {
    if (old.innerHTML === part.innerHTML && old.hidden === part.hidden) return;
    const at = document.activeElement;
    if (!force && old.id === "check" && old.contains(at) && /^(INPUT|TEXTAREA)$/.test(at.tagName)) return; // somebody is writing
    const chosen = document.getSelection();
    if (!force && chosen && !chosen.isCollapsed && old.contains(chosen.anchorNode)) return;
    const open = new Set([...old.querySelectorAll("li[id] details[open]")].map((one) => one.parentElement.id));
    const within = old.contains(at) && at.closest("li[id]")?.id;
    old.replaceChildren(...document.importNode(part, true).childNodes);
    old.hidden = part.hidden;
    if (part.dataset.card) old.dataset.card = part.dataset.card; else delete old.dataset.card;
    for (const id of open) document.querySelector(`#${CSS.escape(id)} details`)?.setAttribute("open", "");
    if (within) document.querySelector(`#${CSS.escape(within)} summary`)?.focus({ preventScroll: true });
  }

  async function ask() {
    if (busy || document.hidden) return;
    busy = true;
    try {
      const answer = await get("/page/mark");
      if (new URL(answer.url).pathname === "/login") { location.assign("/login"); return; }
      if (!answer.ok) throw new TypeError(`status ${answer.status}`);
      const mark = await answer.text();
      if (mark !== line.dataset.mark || Date.now() > fresh + FRESH_MS) await show(await get(address()), { card: false });
      heard = Date.now();
      say(true);
    } catch (error) {
      if (!["TypeError", "TimeoutError", "AbortError"].includes(error.name)) throw error;
      say(false);
    } finally {
      busy = false;
    }
  }

  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (!new URL(form.action).pathname.startsWith("/page/answers/")) return;
    event.preventDefault();
    const fields = new URLSearchParams(new FormData(form, event.submitter));
    const buttons = form.querySelectorAll("button");
    for (const button of buttons) button.disabled = true;
    try {
      await show(await get(form.action, { method: "POST", body: fields }), { card: true });
      history.replaceState(null, "", "/");
      document.getElementById("said").scrollIntoView({ block: "start" });
      document.getElementById("main").focus({ preventScroll: true });
    } catch (error) {
      const told = document.createElement("p");
      told.className = "problem";
      told.setAttribute("role", "alert");
      told.textContent = line.dataset.notSaved;
      form.querySelector(".problem")?.remove();
      form.prepend(told);
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  });

  addEventListener("visibilitychange", ask);
  setInterval(ask, ASK_MS);
  ask();
})();
