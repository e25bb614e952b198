"use strict";
// The URL stores what is shown, so that it can be linked: #hide=soap,mars&axis=seconds&zoom=1&at=120
const charts = JSON.parse(document.getElementById("data").textContent);
const boxes = [...document.querySelectorAll("#legend input")];
const axes = [...document.querySelectorAll("input[name=axis]")];
const zoom = document.getElementById("zoom");
const AREA = { left: 58, right: 790, top: 10, bottom: 334 };
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const SVG = document.querySelector("svg").namespaceURI;

function add(parent, tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const short = (value) => String(Number(value.toPrecision(4)));

// Round steps of 1, 2 or 5 times a power of ten that give about `count` ticks.
function roundTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12); i++) ticks.push(i * step);
  return ticks;
}

function scale(low, high, from, to, log) {
  const along = log ? Math.log : (value) => value;
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  return (value) => from + ((to - from) * (along(value) - along(low))) / (along(high) - along(low));
}

const nearestOf = (items, distance) => items.reduce((best, item) => (distance(item) < distance(best) ? item : best));

function visible(chart) {
  const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  return chart.series.filter((series) => shown.has(series.label));
}

function axisOf(chart) {
  const chosen = axes.find((radio) => radio.checked).value;
  return chosen in chart.axes ? chosen : Object.keys(chart.axes)[0];
}

// The points of a series on one axis, without those that are not finite or left of `from`.
function pointsOf(series, axis, from) {
  const points = series.x[axis].map((x, i) => ({ x, mean: series.mean[i], low: series.low[i], high: series.high[i] }));
  return points.filter((point) => point.mean !== null && point.x >= from);
}

function draw(chart) {
  const svg = document.getElementById(chart.id);
  svg.replaceChildren();
  const axis = axisOf(chart);
  const every = visible(chart).flatMap((series) => series.x[axis]);
  const from = chart.id === "curves" && zoom.checked ? Math.max(...every) / 2 : -Infinity;
  const lines = visible(chart).map((series) => ({ series, points: pointsOf(series, axis, from) }));
  const points = lines.flatMap((line) => line.points);
  svg.dataset.lines = lines.length;
  chart.view = { axis, lines, x: null };
  if (!points.length) return;
  const xs = [...new Set(points.map((point) => point.x))].sort((a, b) => a - b);
  const [low, high] = [Math.min(...points.map((p) => p.low)), Math.max(...points.map((p) => p.high))];
  const room = (high - low) * 0.04 || 0.05;
  const x = scale(xs[0], xs[xs.length - 1], AREA.left, AREA.right, chart.log);
  const y = scale(low - room, high + room, AREA.bottom, AREA.top, false);
  chart.view = { axis, lines, x, y, xs };
  drawAxes(svg, chart, x, y, low - room, high + room);
  for (const line of lines) drawLine(svg, line, x, y);
}

function drawAxes(svg, chart, x, y, low, high) {
  const { xs, axis } = chart.view;
  for (const tick of roundTicks(low, high, 6)) {
    add(svg, "line", { class: "grid", x1: AREA.left, x2: AREA.right, y1: y(tick), y2: y(tick) });
    add(svg, "text", { x: AREA.left - 8, y: y(tick) + 4, "text-anchor": "end" }, short(tick));
  }
  let last = -Infinity;
  for (const tick of chart.log ? xs : roundTicks(xs[0], xs[xs.length - 1], 8)) {
    if (x(tick) - last < 52) continue;
    last = x(tick);
    add(svg, "line", { class: "grid", x1: last, x2: last, y1: AREA.bottom, y2: AREA.bottom + 5 });
    add(svg, "text", { x: last, y: AREA.bottom + 20, "text-anchor": "middle" }, short(tick));
  }
  add(svg, "line", { class: "grid", x1: AREA.left, x2: AREA.right, y1: AREA.bottom, y2: AREA.bottom });
  add(svg, "text", { x: (AREA.left + AREA.right) / 2, y: 374, "text-anchor": "middle" }, chart.axes[axis]);
}

function drawLine(svg, { series, points }, x, y) {
  const box = boxes.find((candidate) => candidate.value === series.label);
  const paint = `var(--c${box.dataset.color})`;
  const dash = DASHES[boxes.indexOf(box) % DASHES.length];
  if (points.some((point) => point.low !== point.high)) {
    const upper = points.map((point) => `${x(point.x)},${y(point.high)}`);
    const lower = points.map((point) => `${x(point.x)},${y(point.low)}`).reverse();
    add(svg, "polygon", { class: "band", points: [...upper, ...lower].join(" "), fill: paint });
  }
  const path = points.map((point) => `${x(point.x)},${y(point.mean)}`).join(" ");
  add(svg, "polyline", { class: "line", points: path, stroke: paint, "stroke-dasharray": dash, "data-name": series.name });
  for (const point of points) add(svg, "circle", { cx: x(point.x), cy: y(point.mean), r: 2.5, fill: paint });
}

// Marks the position nearest to `value` and shows the value of each curve there.
function readOut(chart, value) {
  const { axis, lines, x, xs } = chart.view;
  const output = document.getElementById(`${chart.id}-values`);
  if (!x) return;
  const place = nearestOf(xs, (candidate) => Math.abs(x(candidate) - x(value)));
  chart.place = place;
  const svg = document.getElementById(chart.id);
  svg.querySelector(".cursor")?.remove();
  add(svg, "line", { class: "cursor", x1: x(place), x2: x(place), y1: AREA.top, y2: AREA.bottom });
  const heading = document.createElement("b");
  heading.textContent = `${chart.axes[axis]} ${short(place)}: `;
  const values = lines.filter((line) => line.points.length).map(({ series, points }) => {
    const nearest = nearestOf(points, (point) => Math.abs(point.x - place));
    const entry = document.createElement("span");
    const spread = nearest.low === nearest.high ? "" : ` (${nearest.low.toFixed(4)} to ${nearest.high.toFixed(4)})`;
    const elsewhere = nearest.x === place ? "" : ` at ${short(nearest.x)}`;
    entry.textContent = `${series.name}: ${nearest.mean.toFixed(4)}${spread}${elsewhere}`;
    return entry;
  });
  output.replaceChildren(heading, ...values);
}

function update() {
  charts.forEach(draw);
  const hidden = boxes.filter((box) => !box.checked).map((box) => encodeURIComponent(box.value));
  const parts = [];
  if (hidden.length) parts.push(`hide=${hidden.join(",")}`);
  if (!axes[0].checked) parts.push("axis=seconds");
  if (zoom.checked) parts.push("zoom=1");
  history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : location.pathname + location.search);
}

function readAddress() {
  const wanted = Object.fromEntries(location.hash.slice(1).split("&").map((part) => part.split("=")));
  const hidden = new Set((wanted.hide ?? "").split(",").map(decodeURIComponent));
  for (const box of boxes) box.checked = !hidden.has(box.value);
  for (const radio of axes) radio.checked = radio.value === (wanted.axis ?? "step");
  zoom.checked = wanted.zoom === "1";
  update();
  if (wanted.at) readOut(charts[0], Number(wanted.at));
}

function listen(chart) {
  const svg = document.getElementById(chart.id);
  svg.addEventListener("pointermove", (event) => {
    const { x, xs } = chart.view;
    if (!x) return;
    const across = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    readOut(chart, nearestOf(xs, (value) => Math.abs(x(value) - across)));
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const xs = chart.view.xs;
    if (!step || !xs) return;
    event.preventDefault();
    const now = xs.indexOf(chart.place);
    readOut(chart, xs[Math.min(xs.length - 1, Math.max(0, now < 0 ? xs.length - 1 : now + step))]);
  });
}

charts.forEach(listen);
for (const input of [...boxes, ...axes, zoom]) input.addEventListener("change", update);
addEventListener("hashchange", readAddress);
readAddress();
