"use strict";
// Search and order of the samples. The page is whole without it: the controls are hidden until this runs.
const list = document.getElementById("sample-list");
if (list) {
  const samples = Array.from(list.children);
  const texts = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
  const search = document.getElementById("sample-search");
  const order = document.getElementById("sample-order");
  const count = document.getElementById("sample-count");
  const number = (sample, key) => Number(sample.dataset[key] || 0);
  const orders = {
    either: (a, b) => Math.abs(number(b, "difference")) - Math.abs(number(a, "difference")),
    best: (a, b) => number(b, "difference") - number(a, "difference"),
    worst: (a, b) => number(a, "difference") - number(b, "difference"),
    file: (a, b) => number(a, "number") - number(b, "number"),
  };
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const sample of samples) {
      sample.hidden = !words.every((word) => texts.get(sample).includes(word));
      shown += sample.hidden ? 0 : 1;
    }
    count.textContent = shown + " of " + samples.length;
  };
  search.addEventListener("input", filter);
  order.addEventListener("change", () => list.append(...samples.slice().sort(orders[order.value])));
  document.getElementById("sample-controls").hidden = false;
  filter();
}
