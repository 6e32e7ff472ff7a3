"use strict";
// Search and order of the samples. The page is whole without it: the controls are hidden until this runs.
const list = document.getElementById("sample-list");
if (list) {
  const samples = Array.from(list.children);
  const texts = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
  const search = document.getElementById("sample-search");
  const order = document.getElementById("sample-order");
  const more = document.getElementById("sample-more");
  const portion = 12;
  let limit = portion;
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
    let found = 0;
    for (const sample of list.children) {
      const fits = words.every((word) => texts.get(sample).includes(word));
      found += fits ? 1 : 0;
      // a long list would hide what comes after it, on paper too
      sample.hidden = !fits || found > limit;
    }
    count.textContent = found + " of " + samples.length;
    more.hidden = found <= limit;
  };
  const again = () => {
    limit = portion;
    filter();
  };
  search.addEventListener("input", again);
  order.addEventListener("change", () => {
    list.append(...samples.slice().sort(orders[order.value]));
    again();
  });
  more.addEventListener("click", () => {
    limit += portion;
    filter();
  });
  document.getElementById("sample-controls").hidden = false;
  filter();
}
