"use strict";
// Without this script every sample is shown; with it, one step at a time beside the LoRA's own.
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
  range.addEventListener("input", () => { gallery.classList.add("sliding"); show(); });
  all.addEventListener("click", () => { gallery.classList.toggle("sliding"); show(); });
  gallery.classList.add("sliding");
  bar.hidden = false;
  range.max = steps.length - 1;
  range.value = range.max;
  show();
}
