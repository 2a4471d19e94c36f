"use strict";
// The curves: one small SVG a panel; the pointer reads all of them at one step.

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle"].includes(name);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const CHART = { width: 300, height: 110, left: 44, right: 6, top: 8, bottom: 18 };

function range(lists) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const value of list) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

// The place in a sorted list nearest to a step.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

// `first` and `last` are the same for all charts of a stage, so that one step is one place in all.
function drawChart(panel, first, last) {
  const { width, height, left, right, top, bottom } = CHART;
  let [low, high] = range(panel.lines.map((line) => line.values));
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; low -= pad; high += pad; }
  const x = (step) => left + (width - left - right) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => top + (height - top - bottom) * (1 - (value - low) / (high - low));
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": panel.title });
  for (const value of [low, (low + high) / 2, high])
    svg.append(
      element("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      element("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" }, number(value)));
  svg.append(element("text", { x: left, y: height - 5 }, String(first)));
  if (last > first) svg.append(element("text", { x: width - right, y: height - 5, "text-anchor": "end" }, String(last)));
  const several = panel.lines.length > 1;
  const value = element("span"), names = element("div", { class: "names" }), numbers = [];
  panel.lines.forEach((line, place) => {
    const color = `var(--c${place % 8})`;
    const draw = (values, kind) => svg.append(element("path", {
      d: "M" + values.map((v, i) => `${x(line.steps[i]).toFixed(1)} ${y(v).toFixed(1)}`).join("L"),
      class: kind, style: `stroke:${color}` }));
    draw(line.values, line.mean ? "raw" : "");
    if (line.mean) draw(line.mean, "");
    if (line.values.length < 20)
      line.values.forEach((v, i) => svg.append(element("circle", { cx: x(line.steps[i]), cy: y(v), r: 2, style: `fill:${color}` })));
    numbers.push(element("span"));
    names.append(element("span", {}, element("i", { style: `background:${color}` }), `${line.label} `, numbers[place]));
  });
  const cursor = element("line", { class: "cursor", y1: top, y2: height - bottom });
  svg.append(cursor);
  const chart = element("div", { class: "chart" }, element("h3", {}, panel.title, value), svg, ...(several ? [names] : []));

  function read(step) { // null: the last values
    const places = panel.lines.map((line) => nearest(line.steps, step ?? last));
    const shown = panel.lines[0].steps[places[0]];
    cursor.style.display = step === null ? "none" : "";
    cursor.setAttribute("x1", x(shown));
    cursor.setAttribute("x2", x(shown));
    panel.lines.forEach((line, k) => { numbers[k].textContent = number(line.values[places[k]]); });
    const text = step === null ? "" : `step ${shown}`;
    value.textContent = several ? text : (text && `${text}: `) + numbers[0].textContent;
  }
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect();
    const inside = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
    return first + (last - first) * Math.min(1, Math.max(0, inside));
  };
  read(null);
  return { chart, svg, read, stepAt };
}

function drawCharts(stage) {
  const [first, last] = range(stage.panels.flatMap((panel) => panel.lines.map((line) => line.steps)));
  const charts = stage.panels.map((panel) => drawChart(panel, first, last));
  const place = $("charts");
  place.replaceChildren(...charts.map((c) => c.chart));
  if (!charts.length) place.textContent = "No step has been logged yet.";
  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", (event) => charts.forEach((c) => c.read(chart.stepAt(event))));
    chart.svg.addEventListener("pointerleave", () => charts.forEach((c) => c.read(null)));
  }
}
