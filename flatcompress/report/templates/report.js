"use strict";
// Hover: a cursor line, a dot on each series and a small table. Text goes in by textContent only.
const tip = document.getElementById("tip");
const make = (tag, cls, text) => {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  return node;
};
for (const plot of document.querySelectorAll("[data-tip]")) {
  const data = JSON.parse(plot.dataset.tip);
  const cursor = make("div", "cursor");
  const hide = () => { tip.hidden = true; cursor.remove(); };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const px = 100 * (event.clientX - box.left) / box.width;
    const py = 100 * (event.clientY - box.top) / box.height;
    let at = 0;
    data.x.forEach((x, i) => { if (Math.abs(x - px) < Math.abs(data.x[at] - px)) at = i; });
    let shown = data.s.filter((s) => s.y[at] !== null);
    if (shown.length > 6) {
      shown.sort((a, b) => Math.abs(a.y[at] - py) - Math.abs(b.y[at] - py));
      shown = shown.slice(0, 3);
    }
    cursor.replaceChildren();
    cursor.style.left = data.x[at] + "%";
    tip.replaceChildren(make("b", "", data.l[at]));
    for (const series of shown) {
      const dot = make("i", "c" + series.c);
      dot.style.top = series.y[at] + "%";
      cursor.append(dot);
      const line = make("span", "key c" + series.c, series.n + " ");
      line.append(make("i", "", series.v[at]));
      tip.append(line);
    }
    plot.append(cursor);
    tip.hidden = false;
    const left = event.clientX + 16;
    tip.style.left = Math.max(6, left + tip.offsetWidth > innerWidth - 8 ? event.clientX - tip.offsetWidth - 14 : left) + "px";
    tip.style.top = Math.max(6, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show); // a finger does not hover
  plot.addEventListener("pointerleave", hide);
}

// A table that is wider than the screen says so.
const tell = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    box.classList.toggle("more", box.scrollWidth > box.clientWidth + 1 && box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  }
};
tell();
addEventListener("resize", tell);
for (const box of document.querySelectorAll(".scroll")) box.addEventListener("scroll", tell, { passive: true });
for (const box of document.querySelectorAll("details")) box.addEventListener("toggle", tell);
