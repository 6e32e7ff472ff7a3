"use strict";
// Search and order of the samples. The page is whole without it: the controls are hidden until this runs.
const list = document.getElementById("sample-list");
if (list) {
  const samples = Array.from(list.children);
  const texts = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
  const search = document.getElementById("sample-search");
  const order = document.getElementById("sample-order");
  const more = document.getElementById("sample-more");
  const portion = 6;
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

// Contents: where the reader is, and folded parts that a link leads to.
const links = new Map(Array.from(document.querySelectorAll("nav a"), (link) => [link.hash.slice(1), link]));
const places = Array.from(links.keys(), (id) => document.getElementById(id));
const mark = () => {
  const end = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 2;
  const above = places.filter((place) => place.getBoundingClientRect().top < 120);
  const here = end ? places[places.length - 1] : above[above.length - 1] || places[0];
  for (const [id, link] of links) {
    if (id !== here.id) link.removeAttribute("aria-current");
    else if (!link.hasAttribute("aria-current")) {
      link.setAttribute("aria-current", "true");
      const strip = link.parentElement;
      strip.scrollLeft = link.offsetLeft - strip.offsetLeft - strip.clientWidth / 3;
    }
  }
};
window.addEventListener("scroll", mark, { passive: true });
window.addEventListener("resize", mark);
mark();
const unfold = () => {
  const place = document.getElementById(location.hash.slice(1));
  const first = place && place.querySelector("details");
  if (first) first.open = true;
};
window.addEventListener("hashchange", unfold);
unfold();

// On paper nothing can be unfolded. Afterwards all is as it was.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = Array.from(document.querySelectorAll("details:not([open])"));
  for (const part of folded) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
