"use strict";
// What every part of the page uses: the data, elements, numbers.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// Text reaches the page only as text nodes and attributes' values, never as HTML.
function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle"].includes(name);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function button(text, click, attributes = {}) {
  const node = element("button", { type: "button", ...attributes }, text);
  node.onclick = click;
  return node;
}

// A list of names and what they are: [[name, text], ...].
function terms(pairs, attributes = {}) {
  return element("dl", attributes, ...pairs.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function range(lists) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const value of list) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

// Colour of the run or line of this place; from the ninth on also dashed.
function stroke(place) {
  return `stroke:var(--c${place % 8})` + (place > 7 ? `;stroke-dasharray:${1 + (place >> 3) * 2} 3` : "");
}

const swatch = (place) => element("i", { class: "swatch", style: `background:var(--c${place % 8})` });
