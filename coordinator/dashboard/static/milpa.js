/* Pages are whole without this file. It keeps them live (server-sent events, then the same page again, part by part),
   filters while you type, and gives the keyboard: / filters; g then o, n, r, d, e or a goes. */
"use strict";
(() => {
  const live = document.getElementById("live");
  const filter = document.querySelector("[data-filter]");
  let asking = null, again = false;

  async function refresh() {
    if (asking) { again = true; return; }
    asking = new AbortController();
    const here = location.href;
    try {
      const answer = await fetch(here, { signal: AbortSignal.any([asking.signal, AbortSignal.timeout(15000)]), cache: "no-store" });
      if (answer.redirected && new URL(answer.url).pathname === "/login") { location.reload(); return; }
      if (!answer.ok || here !== location.href) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of fresh.querySelectorAll("[data-live]")) swap(document.getElementById(part.id), part);
      for (const gone of document.querySelectorAll("[data-live]")) if (!fresh.getElementById(gone.id)) gone.remove();
      for (const part of fresh.querySelectorAll("main > [data-live]")) {
        if (!document.getElementById(part.id)) document.getElementById("main").append(document.importNode(part, true));
      }
    } catch (error) {
      if (error.name !== "AbortError" && error.name !== "TimeoutError" && !(error instanceof TypeError)) throw error;
    } finally {
      asking = null;
      if (again) { again = false; refresh(); }
    }
  }

  function swap(old, fresh) {
    if (!old || old.innerHTML === fresh.innerHTML) return;
    const open = [...old.querySelectorAll("details")].map((one) => one.open);
    const focused = old.contains(document.activeElement) ? path(old, document.activeElement) : null;
    const chosen = document.getSelection();
    if (chosen && !chosen.isCollapsed && old.contains(chosen.anchorNode)) return; // never under a selection
    old.replaceChildren(...document.importNode(fresh, true).childNodes);
    old.querySelectorAll("details").forEach((one, number) => { if (number in open) one.open = open[number]; });
    if (focused) { const again = focused.reduce((at, number) => at && at.children[number], old); if (again) again.focus({ preventScroll: true }); }
  }

  function path(top, node) {
    const steps = [];
    for (let at = node; at !== top; at = at.parentElement) steps.unshift([...at.parentElement.children].indexOf(at));
    return steps;
  }

  if (live) {
    let heard = Date.now();
    const clock = () => new Date(heard).toLocaleTimeString(document.documentElement.lang, { hour: "2-digit", minute: "2-digit" });
    const say = (on) => {
      live.textContent = on ? live.dataset.liveText : live.dataset.cutText.replace("{time}", clock());
      live.classList.toggle("on", on);
      live.classList.toggle("cut", !on);
    };
    let source = null;
    const word = () => { heard = Date.now(); say(true); refresh(); };
    const connect = () => {
      const line = source = new EventSource("/events");
      line.addEventListener("change", word);
      line.addEventListener("tick", word);
      line.addEventListener("error", () => {
        say(false);
        if (line.readyState === EventSource.CLOSED && line === source) setTimeout(() => location.reload(), 5000);
      });
    };
    connect();
    // a browser holds six connections to one address: pages nobody looks at give theirs back
    document.addEventListener("visibilitychange", () => { source.close(); if (!document.hidden) connect(); });
    addEventListener("pagehide", () => source.close());
    addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  }

  if (filter) {
    let later = 0;
    filter.addEventListener("input", () => {
      const url = new URL(location.href);
      if (filter.value) url.searchParams.set("q", filter.value); else url.searchParams.delete("q");
      history.replaceState(null, "", url);
      clearTimeout(later);
      later = setTimeout(refresh, 80);
    });
    filter.addEventListener("keydown", (event) => { if (event.key === "Escape") { filter.value = ""; filter.dispatchEvent(new Event("input")); filter.blur(); } });
  }

  let going = false;
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    if (event.key === "/") { event.preventDefault(); if (filter) { filter.focus(); filter.select(); } else if (live) location.assign("/nodes"); return; }
    if (going) {
      going = false;
      const link = document.querySelector(`nav a[aria-keyshortcuts="g ${CSS.escape(event.key)}"]`);
      if (link) { event.preventDefault(); link.click(); }
    } else if (event.key === "g") { going = true; setTimeout(() => { going = false; }, 1500); }
  });
})();
