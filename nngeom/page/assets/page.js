"use strict";
// Draws the charts that the page carries as JSON, and lets tables be sorted and filtered. Asks for nothing from outside.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98"];
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function told(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(2) : String(Number(x.toPrecision(4)));
}

function button(text, pressed, act) {
  const node = make("button", { type: "button", "aria-pressed": String(pressed) }, text);
  node.addEventListener("click", () => {
    const now = node.getAttribute("aria-pressed") !== "true";
    node.setAttribute("aria-pressed", String(now));
    act(now);
  });
  return node;
}

// A scale maps numbers to [0, 1] and knows its ticks.
function scale(values, logarithmic) {
  const fit = values.filter((v) => v !== null && Number.isFinite(v) && (!logarithmic || v > 0));
  if (!fit.length) return null;
  const turn = logarithmic ? Math.log10 : (v) => v;
  let low = turn(fit.reduce((a, b) => Math.min(a, b)));
  let high = turn(fit.reduce((a, b) => Math.max(a, b)));
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) [low, high] = [low - 0.5, high + 0.5];
  const ticks = logarithmic ? decades(low, high) : evenly(low, high);
  return {
    of: (v) => (logarithmic && !(v > 0) ? NaN : (turn(v) - low) / (high - low)),
    ticks: ticks.map((t) => ({ at: (t - low) / (high - low), text: told(logarithmic ? 10 ** t : Number(t.toPrecision(12))) })),
  };
}

function evenly(low, high) {
  const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * unit >= rough) * unit, ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(k * step);
  return ticks;
}

function decades(low, high) {
  const within = [1, 2, 5].map(Math.log10), every = Math.ceil((high - low) / 6), ticks = [];
  for (let k = Math.floor(low); k <= high; k++) {
    if (high - low > 2.5) { if (k % every === 0) ticks.push(k); } else ticks.push(...within.map((m) => k + m));
  }
  return ticks.filter((t) => t >= low - 1e-9 && t <= high + 1e-9);
}

function tip(figure) {
  const node = make("div", { class: "tip", hidden: "" });
  figure.append(node);
  return {
    show(x, y, text) {
      node.hidden = false;
      node.textContent = text;
      const half = node.offsetWidth / 2;
      node.style.left = Math.min(Math.max(x, half), figure.clientWidth - half) + "px";
      node.style.top = y + "px";
    },
    hide() { node.hidden = true; },
  };
}

function frame(width, height) {
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
}

function lines(block, holder) {
  const state = { x: block.log_x, y: block.log_y, off: new Set() };
  const bar = make("div", { class: "bar" });
  const figure = make("figure");
  const pointer = tip(figure);
  bar.append(
    button("log x", state.x, (on) => { state.x = on; paint(); }),
    button("log y", state.y, (on) => { state.y = on; paint(); }),
  );
  block.series.forEach((s, j) => {
    const swatch = make("i");
    swatch.style.background = COLOURS[j % COLOURS.length];
    const node = button(s.name, true, (on) => { on ? state.off.delete(j) : state.off.add(j); paint(); });
    node.classList.add("series");
    node.prepend(swatch);
    bar.append(node);
  });
  holder.append(bar, figure);

  function paint() {
    figure.querySelector("svg")?.remove();
    pointer.hide();
    const width = Math.max(figure.clientWidth, 260), height = 280, left = 66, bottom = 42, top = 10, right = 14;
    const shown = block.series.map((s, j) => ({ ...s, j })).filter((s) => !state.off.has(s.j));
    const xs = scale(shown.flatMap((s) => s.x), state.x), ys = scale(shown.flatMap((s) => s.y), state.y);
    const svg = frame(width, height);
    svg.setAttribute("aria-label", block.caption);
    figure.prepend(svg);
    if (!xs || !ys) {
      svg.append(draw("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show on these axes"));
      return;
    }
    const px = (v) => left + xs.of(v) * (width - left - right), py = (v) => height - bottom - ys.of(v) * (height - bottom - top);
    const crowded = Math.ceil((xs.ticks.length * 64) / (width - left - right));
    for (const t of ys.ticks) {
      const y = height - bottom - t.at * (height - bottom - top);
      svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
      svg.append(draw("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, t.text));
    }
    xs.ticks.forEach((t, k) => {
      const x = left + t.at * (width - left - right);
      svg.append(draw("line", { class: "grid", x1: x, x2: x, y1: top, y2: height - bottom }));
      if (k % crowded === 0) svg.append(draw("text", { x, y: height - bottom + 17, "text-anchor": "middle" }, t.text));
    });
    svg.append(draw("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, block.x));
    svg.append(draw("text", { transform: `translate(12 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, block.y));
    const points = [];
    for (const s of shown) {
      const colour = COLOURS[s.j % COLOURS.length];
      let path = "", pen = "M";
      s.x.forEach((v, k) => {
        const x = v === null ? NaN : px(v), y = s.y[k] === null ? NaN : py(s.y[k]);
        if (!Number.isFinite(x) || !Number.isFinite(y)) { pen = "M"; return; }
        path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
        pen = "L";
        points.push([x, y, `${s.name}: ${told(v)}, ${told(s.y[k])}`]);
        if (s.x.length <= 60) svg.append(draw("circle", { cx: x, cy: y, r: 2.4, fill: colour }));
      });
      svg.append(draw("path", { d: path, fill: "none", stroke: colour, "stroke-width": 1.6 }));
    }
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const mx = ((event.clientX - box.left) * width) / box.width, my = event.clientY - box.top;
      let best = null, least = 40 ** 2;
      for (const p of points) {
        const d = (p[0] - mx) ** 2 + (p[1] - my) ** 2;
        if (d < least) [best, least] = [p, d];
      }
      best ? pointer.show((best[0] * box.width) / width, best[1], best[2]) : pointer.hide();
    });
    svg.addEventListener("pointerleave", pointer.hide);
  }
  return paint;
}

function bars(block, holder) {
  let chosen = 0;
  const bar = make("div", { class: "bar" });
  const select = make("select", { "aria-label": block.caption });
  block.groups.forEach((g, j) => select.append(make("option", { value: j }, g.name)));
  select.addEventListener("change", () => { chosen = Number(select.value); paint(); });
  bar.append(select);
  const figure = make("figure");
  const pointer = tip(figure);
  holder.append(bar, figure);

  function paint() {
    figure.querySelector("svg")?.remove();
    pointer.hide();
    const group = block.groups[chosen], row = 20;
    const longest = group.labels.reduce((a, b) => Math.max(a, b.length), 1);
    const width = Math.max(figure.clientWidth, 260), left = Math.min(20 + 7 * longest, width * 0.4), right = 74;
    const height = row * group.values.length + 8;
    const numbers = group.values.filter((v) => v !== null);
    const low = Math.min(0, ...numbers), high = Math.max(0, ...numbers), span = high - low || 1;
    const px = (v) => left + ((v - low) / span) * (width - left - right);
    const svg = frame(width, height);
    svg.setAttribute("aria-label", `${block.caption}: ${group.name}`);
    group.values.forEach((v, k) => {
      const y = 4 + k * row, most = Math.floor((left - 14) / 7), label = group.labels[k];
      svg.append(draw("text", { x: left - 6, y: y + 14, "text-anchor": "end" }, label.length > most ? "…" + label.slice(1 - most) : label));
      if (v === null) { svg.append(draw("text", { x: px(0) + 6, y: y + 14 }, "not known")); return; }
      const from = Math.min(px(0), px(v)), wide = Math.max(Math.abs(px(v) - px(0)), 0.5);
      const rect = draw("rect", { x: from, y: y + 2, width: wide, height: row - 5, fill: COLOURS[v < 0 ? 1 : 0] });
      rect.addEventListener("pointerenter", () => pointer.show(((from + wide / 2) * figure.clientWidth) / width, y, `${label}: ${told(v)}`));
      rect.addEventListener("pointerleave", pointer.hide);
      svg.append(rect, draw("text", { x: Math.max(px(v), px(0)) + 5, y: y + 14 }, told(v)));
    });
    svg.append(draw("line", { class: "axis", x1: px(0), x2: px(0), y1: 2, y2: height - 2 }));
    figure.prepend(svg);
  }
  return paint;
}

function sortable(table) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const press = make("button", { type: "button", title: "sort" }, cell.textContent);
    cell.replaceChildren(press);
    press.addEventListener("click", () => {
      const order = cell.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", order);
      const key = (row) => row.cells[column].textContent;
      const number = (text) => (text.trim() === "" ? NaN : Number(text.replaceAll(",", "")));
      const numeric = [...body.rows].some((row) => !Number.isNaN(number(key(row))));
      const compare = numeric
        ? (a, b) => (Number.isNaN(number(a)) - Number.isNaN(number(b))) || number(a) - number(b)
        : (a, b) => a.localeCompare(b, undefined, { numeric: true });
      const rows = [...body.rows].sort((a, b) => compare(key(a), key(b)));
      if (order === "descending") rows.reverse();
      body.append(...rows);
    });
  });
}

function filtered(table, holder) {
  if (table.tBodies[0].rows.length < 12) return;
  const input = make("input", { type: "search", placeholder: "filter rows", "aria-label": "filter rows" });
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  holder.before(make("div", { class: "bar" }, input));
}

const painters = [];
for (const holder of document.querySelectorAll("[data-chart]")) {
  const block = JSON.parse(document.getElementById(holder.dataset.chart).textContent);
  painters.push((block.kind === "lines" ? lines : bars)(block, holder));
}
for (const holder of document.querySelectorAll(".scroll")) {
  sortable(holder.querySelector("table"));
  filtered(holder.querySelector("table"), holder);
}
const paintAll = () => painters.forEach((paint) => paint());
let width = document.body.clientWidth;
addEventListener("resize", () => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  paintAll();
});
paintAll();
