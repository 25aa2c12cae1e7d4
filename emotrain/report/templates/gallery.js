"use strict";
// Without this script every sample is shown; with it, one step at a time beside the LoRA's own.
// The page of a running run loads itself again; what was chosen comes back from the browser's history.
const kept = history.state || {};
let chosen = kept.chosen || "", whole = Boolean(kept.whole);
for (const gallery of document.querySelectorAll(".gallery")) {
  const bar = gallery.querySelector(".slider");
  const range = bar.querySelector("input"), name = bar.querySelector("output"), all = bar.querySelector("button");
  const steps = gallery.querySelector(".strip").querySelectorAll("figure:not(.own) figcaption");
  const show = () => {
    const sliding = gallery.classList.contains("sliding");
    name.textContent = sliding ? steps[range.value].textContent : "every step";
    all.textContent = sliding ? "show every step" : "show one step";
    for (const strip of gallery.querySelectorAll(".strip"))
      strip.querySelectorAll("figure:not(.own)").forEach((figure, k) => { figure.hidden = sliding && k !== Number(range.value); });
  };
  if (steps.length < 2) continue;
  range.max = steps.length - 1;
  range.addEventListener("input", () => {
    gallery.classList.add("sliding");
    chosen = range.value === range.max ? "" : steps[range.value].dataset.step;  // "": whichever is the newest
    whole = false;
    show();
  });
  all.addEventListener("click", () => { whole = !gallery.classList.toggle("sliding"); show(); });
  gallery.classList.toggle("sliding", !whole);
  bar.hidden = false;
  const at = [...steps].findIndex(step => step.dataset.step === chosen);
  range.value = at < 0 ? range.max : at;
  show();
}
const wait = Number(document.body.dataset.refresh);
if (wait) setTimeout(() => { history.replaceState({ chosen, whole }, ""); location.reload(); }, 1000 * wait);
