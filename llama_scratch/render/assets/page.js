"use strict";
const maps = JSON.parse(document.getElementById("maps").textContent);
const tip = document.getElementById("tip");

// --- Tooltips of the field under the pointer or with the focus ---

function say(text, x, y) {
  tip.textContent = text;
  tip.classList.toggle("on", Boolean(text));
  const room = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - room.width - 8)) + "px";
  tip.style.top = (y + 18 + room.height > innerHeight ? Math.max(8, y - room.height - 12) : y + 18) + "px";
}
function sayOf(element, event) {
  const box = element.getBoundingClientRect();
  if (event && event.clientX) say(element.dataset.hover, event.clientX, event.clientY);
  else say(element.dataset.hover, box.left, box.bottom - 12);
}
// Shows the last keyboard tooltip again, to keep it in place while the page scrolls.
let again = null;
for (const kind of ["pointermove", "pointerdown", "focusin"]) {
  document.addEventListener(kind, (event) => {
    again = null;
    if (event.target.tagName === "CANVAS") return;
    const said = event.target.closest && event.target.closest("[data-hover]");
    if (!said) return say("", 0, 0);
    sayOf(said, event);
    if (kind === "focusin") again = () => sayOf(said);
  });
}
document.addEventListener("scroll", () => (again ? again() : say("", 0, 0)), true);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    again = null;
    say("", 0, 0);
  }
});

// --- Keys: each map, table and gallery is one tab stop; arrow keys move within it ---

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const stops = (group) => [...group.querySelectorAll("[tabindex]")];

// The nearest element in a direction, [down, right].
function neighbor(element, elements, [down, right]) {
  const center = (other) => {
    const box = other.getBoundingClientRect();
    return [box.top + box.height / 2, box.left + box.width / 2];
  };
  const [y, x] = center(element);
  let best = null, least = Infinity;
  for (const other of elements) {
    const [oy, ox] = center(other), along = (oy - y) * down + (ox - x) * right;
    const distance = along + 3 * Math.abs((oy - y) * right + (ox - x) * down);
    if (along > 1 && distance < least) [best, least] = [other, distance];
  }
  return best;
}
for (const group of document.querySelectorAll("[data-rove]")) {
  const first = stops(group)[0];
  if (first) first.tabIndex = 0;
  group.addEventListener("keydown", (event) => {
    const next = ARROWS[event.key] && neighbor(event.target, stops(group), ARROWS[event.key]);
    if (event.defaultPrevented || !ARROWS[event.key]) return;
    event.preventDefault();
    if (next) next.focus();
  });
  group.addEventListener("focusin", (event) => {
    for (const stop of stops(group)) stop.tabIndex = stop === event.target ? 0 : -1;
  });
}

// --- Heat maps ---

function figure(value) {
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}
function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1 %";
  if (share >= 0.9995 && share < 1) return ">99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}
function hover(map, row, column) {
  const value = map.values[row][column];
  if (map.hovers) return map.hovers[row][column];
  if (value === null) return "";
  const names = { row: map.rows[row], column: map.columns[column], value: map.percent ? percent(value) : figure(value) };
  return map.says.replace(/\{(row|column|value)\}/g, (_, name) => names[name]);
}
function shade(map, value, style) {
  const steps = map.steps - 1;
  if (!map.signed) {
    const level = Math.max(0, Math.min(1, (value - map.low) / (map.high - map.low || 1)));
    return style.getPropertyValue(`--v${Math.round(steps * level)}`);
  }
  const level = Math.max(-1, Math.min(1, value / Math.max(-map.low, map.high)));
  return style.getPropertyValue(`--${level < 0 ? "m" : "p"}${Math.round(steps * Math.abs(level))}`);
}
function cut(text, most) {
  const characters = Array.from(text);
  return characters.length > most ? characters.slice(0, most - 1).join("") + "…" : text;
}
function draw(canvas) {
  const map = maps[canvas.dataset.map], small = "small" in canvas.dataset;
  if (!canvas.parentElement.clientWidth) return; // in a folded section
  const style = getComputedStyle(document.documentElement), context = canvas.getContext("2d");
  const room = canvas.parentElement.clientWidth, font = "12px " + getComputedStyle(canvas).fontFamily;
  const count = map.columns.length, height = map.rows.length;
  context.font = font;
  const rows = map.rows.map((text) => cut(text, 16)), columns = map.columns.map((text) => cut(text, 14));
  const widest = (texts) => Math.max(0, ...texts.map((text) => context.measureText(text).width));
  const left = small ? 0 : Math.ceil(widest(rows)) + 8, top = small ? 0 : Math.ceil(widest(columns)) + 8;
  const size = small
    ? Math.max(1, Math.min(24, Math.floor(Math.min(room, 170) / count)))
    : Math.max(4, Math.min(26, Math.floor((room - left - 2) / count)));
  const scale = devicePixelRatio || 1, gap = size >= 8 ? 1 : 0;
  const wide = left + size * count, high = top + size * height;
  canvas.width = wide * scale;
  canvas.height = high * scale;
  canvas.style.width = wide + "px";
  canvas.style.height = high + "px";
  canvas.place = { left, top, size };
  context.scale(scale, scale);
  context.font = font;
  context.textBaseline = "middle";
  for (let r = 0; r < height; r++) {
    for (let c = 0; c < count; c++) {
      const value = map.values[r][c];
      if (value === null) continue;
      const marked = map.marked && map.marked[r][c];
      context.fillStyle = marked ? style.getPropertyValue("--answer") : shade(map, value, style);
      context.fillRect(left + c * size, top + r * size, size - gap, size - gap);
    }
  }
  context.fillStyle = style.getPropertyValue("--soft");
  const step = Math.ceil(14 / size);
  for (let r = 0; !small && r < height; r += step) {
    context.fillText(rows[r], left - 6 - context.measureText(rows[r]).width, top + (r + 0.5) * size);
  }
  for (let c = 0; !small && c < count; c += step) {
    context.save();
    context.translate(left + (c + 0.5) * size, top - 6);
    context.rotate(-Math.PI / 2);
    context.fillText(columns[c], 0, 0);
    context.restore();
  }
  if (canvas.at) {
    context.strokeStyle = style.getPropertyValue("--ink");
    context.lineWidth = 2;
    context.strokeRect(left + canvas.at[1] * size, top + canvas.at[0] * size, size - gap, size - gap);
  }
}
function point(canvas, row, column) {
  const map = maps[canvas.dataset.map], box = canvas.getBoundingClientRect(), { left, top, size } = canvas.place;
  const inside = row >= 0 && column >= 0 && row < map.rows.length && column < map.columns.length;
  const text = inside ? hover(map, row, column) : "";
  const before = String(canvas.at);
  canvas.at = text ? [row, column] : null;
  if (before !== String(canvas.at)) draw(canvas);
  say(text, box.left + left + (column + 0.5) * size, box.top + top + (row + 0.5) * size);
}
for (const canvas of document.querySelectorAll("canvas")) {
  draw(canvas);
  const under = (event) => {
    const { left, top, size } = canvas.place;
    point(canvas, Math.floor((event.offsetY - top) / size), Math.floor((event.offsetX - left) / size));
  };
  canvas.addEventListener("pointermove", under);
  canvas.addEventListener("pointerdown", under);
  canvas.addEventListener("pointerleave", () => point(canvas, -1, -1));
  canvas.addEventListener("blur", () => point(canvas, -1, -1));
  canvas.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key], small = "small" in canvas.dataset;
    if (small && event.key === "Escape") return point(canvas, -1, -1);
    if (!(small && event.key === "Enter" && !canvas.at) && !(step && (canvas.at || !small))) return;
    event.preventDefault();
    const map = maps[canvas.dataset.map], move = step || [0, 0], at = canvas.at || [-move[0], -move[1]];
    const [row, column] = [at[0] + move[0], at[1] + move[1]].map((n, i) =>
      Math.max(0, Math.min(n, (i ? map.columns : map.rows).length - 1)));
    if (!hover(map, row, column)) return;
    again = () => point(canvas, row, column);
    again();
  });
}
// The answer is at the right end of a map that is wider than the page.
for (const box of document.querySelectorAll("[data-end]")) box.scrollLeft = box.scrollWidth;
function drawAll() {
  document.querySelectorAll("canvas").forEach(draw);
}
addEventListener("resize", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// --- Reports ---

// Folded sections open if a link leads into them, and for printing.
function unfold(details) {
  details.open = true;
  details.querySelectorAll("canvas").forEach(draw);
}
function reveal(hash) {
  const target = document.getElementById(decodeURIComponent(hash.slice(1)));
  const details = target && target.closest("details");
  if (!details) return;
  unfold(details);
  target.scrollIntoView();
}
document.addEventListener("toggle", (event) => event.target.querySelectorAll("canvas").forEach(draw), true);
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (link) reveal(link.hash);
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(unfold));
reveal(location.hash);

// The picture shows the arcs of the head whose name or map is under the pointer or has the focus.
const arcs = document.querySelectorAll(".arcs g"), looks = document.querySelector(".looks");
const main = document.querySelector(".arcs g.on");
function show(named) {
  const group = (named && [...arcs].find((each) => each.dataset.arcs === named.dataset.head)) || main;
  for (const each of arcs) each.classList.toggle("on", each === group);
  looks.textContent = group ? group.dataset.said : looks.dataset.said;
}
for (const kind of looks ? ["pointerover", "focusin"] : []) {
  document.addEventListener(kind, (event) => show(event.target.closest("[data-head]")));
}
// A narrow screen begins with the end of the text.
for (const box of document.querySelectorAll(".scroll.end")) box.scrollLeft = box.scrollWidth;
