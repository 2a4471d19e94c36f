// The curves: one small SVG per metric, all runs in it; the pointer reads all of them at one step.

const WIDTH = 310, HEIGHT = 118, LEFT = 46, RIGHT = 302, TOP = 10, BOTTOM = 100; // of the drawing, and of its axes

// One run: a panel's metrics in one chart. Several: a chart per metric, and a line per run.
function chartsOf({ title, lines }, runs) {
  const charts = runs.length === 1
    ? [{ title, lines: lines.map(([metric, label], place) => ({ ...runs[0].series[metric], label, place })) }]
    : lines.map(([metric, label]) => ({
      title: lines.length > 1 ? `${title}: ${label}` : title,
      lines: runs.map((run) => ({ ...run.series[metric], label: run.name, place: RUNS.indexOf(run) })),
    }));
  for (const chart of charts) chart.lines = chart.lines.filter((line) => line.steps);
  return charts.filter((chart) => chart.lines.length);
}

const isConstant = (chart) => chart.lines.every(({ values }) => values.every((value) => value === values[0]));

function constantText({ lines }) {
  const equal = lines.every((line) => line.values[0] === lines[0].values[0]);
  return equal ? number(lines[0].values[0]) : lines.map((line) => `${line.label} ${number(line.values[0])}`).join(" · ");
}

// The value of a line at a step, or at the last one before it that has a value; none after its end.
function valueAt({ steps, values }, step) {
  return step > steps[steps.length - 1] ? null : values[steps.findLastIndex((own) => own <= step)];
}

// `first` and `last` are the same for all charts, so that one step is one place in all.
function drawChart({ title, lines }, first, last) {
  let [low, peak] = range(lines.flatMap((line) => line.values));
  let high = Math.max(...lines.map((line) => line.top ?? range(line.values)[1]));
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; low -= pad; high += pad; }
  const x = (step) => LEFT + (RIGHT - LEFT) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => BOTTOM - (BOTTOM - TOP) * (Math.min(value, high) - low) / (high - low);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const label = (text, x, y, anchor = "end") => svg.append(element("text", { x, y, "text-anchor": anchor }, text));
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }));
    label(number(value, 3), LEFT - 5, y(value) + 3.5);
  }
  label(first, LEFT, HEIGHT - 4, "start");
  if (last > first) label(last, RIGHT, HEIGHT - 4);
  if (peak > high) label(`up to ${number(peak)} ↑`, RIGHT, TOP + 10);
  const value = element("span"), names = element("div", { class: "names" }), numbers = [];
  for (const { place, steps, values, mean, label } of lines) {
    const color = `var(--c${place % 8})`, dashes = place > 7 ? 1 + (place >> 3) * 2 : "none";
    const draw = (values, kind) => svg.append(element("path", {
      d: "M" + values.map((v, i) => `${x(steps[i]).toFixed(1)} ${y(v).toFixed(1)}`).join("L"),
      class: kind, style: `stroke:${color};stroke-dasharray:${dashes}` }));
    draw(values, mean ? "raw" : "");
    if (mean) draw(mean, "");
    if (values.length < 20)
      svg.append(...values.map((v, i) => element("circle", { cx: x(steps[i]), cy: y(v), r: 2, style: `fill:${color}` })));
    numbers.push(element("span"));
    names.append(element("span", {}, swatch(place), `${label} `, numbers[numbers.length - 1]));
  }
  const cursor = element("line", { class: "cursor", y1: TOP, y2: BOTTOM });
  svg.append(cursor);
  const many = lines.length > 1, node = element("div", { class: "chart" }, element("h3", {}, title, value), svg, ...(many ? [names] : []));

  function read(step) { // null: each line's last value
    cursor.style = step === null ? "display:none" : `transform:translateX(${x(step)}px)`;
    lines.forEach((line, k) => { numbers[k].textContent = number(valueAt(line, step ?? line.steps[line.steps.length - 1])); });
    const parts = step === null ? [] : [`step ${step}`];
    value.textContent = (many ? parts : [...parts, numbers[0].textContent]).join(": ");
  }
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect(), inside = (event.clientX - box.left) / box.width * WIDTH;
    return Math.round(first + (last - first) * Math.min(1, Math.max(0, (inside - LEFT) / (RIGHT - LEFT))));
  };
  read(null);
  return { node, svg, read, stepAt };
}

function drawCharts() {
  const all = DATA.panels.flatMap((panel) => chartsOf(panel, RUNS.filter((run) => run.shown)));
  const [first, last] = range(all.flatMap((chart) => chart.lines.flatMap((line) => line.steps)));
  const charts = all.filter((chart) => !isConstant(chart)).map((chart) => drawChart(chart, first, last));
  $("charts").replaceChildren(...(all.length ? charts.map((chart) => chart.node) : ["No step has been logged yet."]));
  for (const { svg, stepAt } of charts) {
    svg.onpointermove = (event) => charts.forEach((chart) => chart.read(stepAt(event)));
    svg.onpointerleave = () => charts.forEach((chart) => chart.read(null));
  }
  const still = all.filter(isConstant).map((chart) => [chart.title, constantText(chart)]);
  $("constant").hidden = !still.length;
  if (!charts.length) $("constant").open = true;
  $("constant").replaceChildren(
    element("summary", {}, `${still.length} ${still.length === 1 ? "metric" : "metrics"} with one constant value`), terms(still));
}
