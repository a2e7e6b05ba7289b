// What htmx leaves to the page: where it was scrolled and opened, the dialog, and lost answers.
"use strict";

const dialog = document.getElementById("dialog");
const lost = document.getElementById("lost");
const clock = document.getElementById("clock");
let opener = "";
let answered = new Date();

const time = (at) => at.toLocaleTimeString([], { hour12: false });
const kept = new Map();

const keep = (part) => {
  for (const box of part.querySelectorAll(".scroll[id]")) {
    const end = box.scrollHeight - box.scrollTop - box.clientHeight < 4;
    kept.set(box.id, { left: box.scrollLeft, top: box.scrollTop, end });
  }
  for (const card of part.querySelectorAll("details[id]")) kept.set(card.id, { open: card.open });
};

const restore = (part) => {
  for (const box of part.querySelectorAll(".scroll[id]")) {
    const was = kept.get(box.id);
    const follows = box.classList.contains("log") && (!was || was.end);
    if (follows) box.scrollTop = box.scrollHeight;
    else if (was) box.scrollTo({ left: was.left, top: was.top, behavior: "instant" });
  }
  for (const card of part.querySelectorAll("details[id]")) {
    const was = kept.get(card.id);
    if (was) card.open = was.open;
  }
};

const heard = () => {
  answered = new Date();
  lost.hidden = true;
  clock.textContent = `updated ${time(answered)}`;
};

const silent = (why) => {
  lost.textContent = `${why} since ${time(answered)}. Nothing below is newer.`;
  lost.hidden = false;
};

document.body.addEventListener("htmx:beforeRequest", (event) => {
  const polls = event.detail.elt.classList.contains("part");
  if (polls && document.hidden) event.preventDefault();
});

document.body.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.target.classList.contains("part")) keep(event.detail.target);
});

document.body.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target === dialog) {
    if (!dialog.open) {
      opener = event.detail.requestConfig.elt.id;
      dialog.showModal();
    } else dialog.querySelector("[autofocus]").focus();
    return;
  }
  const part = document.getElementById(event.detail.target.id);
  if (part) restore(part);
});

document.body.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) heard();
});
document.body.addEventListener("htmx:sendError", () => silent("No answer from the board"));
document.body.addEventListener("htmx:timeout", () => silent("No answer from the board"));
document.body.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  silent(status === 401 ? "The board has begun anew and is locked" : `The board answers ${status}`);
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) htmx.trigger(document.body, "changed");
});

dialog.addEventListener("click", (event) => {
  if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
});
dialog.addEventListener("close", () => {
  dialog.replaceChildren();
  const back = document.getElementById(opener) ?? document.querySelector("#head-title");
  back.focus();
});

restore(document);
heard();
