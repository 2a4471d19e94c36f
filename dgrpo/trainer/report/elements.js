"use strict";
// What every part of the page uses: the data, elements, numbers.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const $ = (id) => document.getElementById(id);

// Text reaches the page only as text nodes and attributes' values, never as HTML.
function element(name, attributes = {}, ...children) {
  const node = ["svg", "path", "line", "text", "circle"].includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function button(children, click, attributes = {}) {
  const node = element("button", { type: "button", ...attributes }, ...children);
  node.onclick = click;
  return node;
}

// A list of names and what they are: [[name, text], ...].
function terms(pairs) {
  return element("dl", {}, ...pairs.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function number(value, digits = 4) {
  if (typeof value !== "number") return String(value ?? "–");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number.isInteger(value) ? value : Number(value.toPrecision(digits)));
}

function range(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

const swatch = (place) => element("i", { class: "swatch", style: `background:var(--c${place % 8})` });
