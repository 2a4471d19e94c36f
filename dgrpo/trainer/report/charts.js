// The curves: one small SVG per metric, all runs in it; the pointer reads all of them at one step.

const CHART = { height: 118, left: 46, right: 8, top: 10, bottom: 18, narrowest: 265, gap: 12, inside: 22 };

// The place in a sorted list nearest to a step.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

// The value of a line at a step; null where the line has ended, or not begun.
function valueAt(line, step) {
  const place = nearest(line.steps, step), count = line.steps.length;
  const spacing = count > 1 ? (line.steps[count - 1] - line.steps[0]) / (count - 1) : 1;
  return Math.abs(line.steps[place] - step) <= Math.max(spacing, 1) ? line.values[place] : null;
}

// One run: a panel's metrics in one chart. Several: a chart per metric, and a line per run.
function chartsOf(panel, runs) {
  const charts = runs.length === 1
    ? [{ title: panel.title, lines: panel.lines.map(([metric, label], place) => ({ ...runs[0].series[metric], label, place })) }]
    : panel.lines.map(([metric, label]) => ({
      title: panel.lines.length > 1 ? `${panel.title}: ${label}` : panel.title,
      lines: runs.map((run) => ({ ...run.series[metric], label: run.name, place: run.place })),
    }));
  for (const chart of charts) chart.lines = chart.lines.filter((line) => line.steps);
  return charts.filter((chart) => chart.lines.length);
}

const isConstant = (line) => line.values.every((value) => value === line.values[0]);

function constantText(chart) {
  const values = new Set(chart.lines.map((line) => line.values[0]));
  if (values.size === 1) return number(chart.lines[0].values[0]);
  return chart.lines.map((line) => `${line.label} ${number(line.values[0])}`).join(" · ");
}

// `first` and `last` are the same for all charts, so that one step is one place in all.
function drawChart({ title, lines }, first, last, width) {
  const { height, left, right, top, bottom } = CHART;
  let [low, high] = range(lines.map((line) => line.values));
  const peak = high;
  if (lines.some((line) => line.top)) high = Math.max(...lines.map((line) => line.top ?? range([line.values])[1]));
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; low -= pad; high += pad; }
  const x = (step) => left + (width - left - right) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => top + (height - top - bottom) * (1 - (Math.min(value, high) - low) / (high - low));
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const value of [low, (low + high) / 2, high])
    svg.append(
      element("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      element("text", { x: left - 5, y: y(value) + 3.5, "text-anchor": "end" }, number(Number(value.toPrecision(3)))));
  svg.append(element("text", { x: left, y: height - 4 }, String(first)));
  if (last > first) svg.append(element("text", { x: width - right, y: height - 4, "text-anchor": "end" }, String(last)));
  const many = lines.length > 1, value = element("span"), names = element("div", { class: "names" }), numbers = [];
  for (const line of lines) {
    const draw = (values, kind) => svg.append(element("path", {
      d: "M" + values.map((v, i) => `${x(line.steps[i]).toFixed(1)} ${y(v).toFixed(1)}`).join("L"),
      class: kind, style: stroke(line.place) }));
    draw(line.values, line.mean ? "raw" : "");
    if (line.mean) draw(line.mean, "");
    if (line.values.length < 20)
      line.values.forEach((v, i) => svg.append(element("circle", { cx: x(line.steps[i]), cy: y(v), r: 2, style: `fill:var(--c${line.place % 8})` })));
    numbers.push(element("span"));
    names.append(element("span", {}, swatch(line.place), `${line.label} `, numbers[numbers.length - 1]));
  }
  if (peak > high) svg.append(element("text", { class: "peak", x: width - right, y: top + 10, "text-anchor": "end" }, `up to ${number(peak)} ↑`));
  const cursor = element("line", { class: "cursor", y1: top, y2: height - bottom });
  svg.append(cursor);
  const chart = element("div", { class: "chart" }, element("h3", {}, title, value), svg, ...(many ? [names] : []));

  function read(step) { // null: each line's last value
    const own = lines[0].steps, shown = step === null ? last : many ? Math.round(step) : own[nearest(own, step)];
    cursor.style.display = step === null ? "none" : "";
    cursor.setAttribute("x1", x(shown));
    cursor.setAttribute("x2", x(shown));
    lines.forEach((line, k) => {
      numbers[k].textContent = number(step === null ? line.values[line.values.length - 1] : valueAt(line, shown));
    });
    const text = step === null ? "" : `step ${shown}`;
    value.textContent = many ? text : (text && `${text}: `) + numbers[0].textContent;
  }
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect();
    const inside = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
    return first + (last - first) * Math.min(1, Math.max(0, inside));
  };
  read(null);
  return { chart, svg, read, stepAt };
}

function drawCharts() {
  const runs = shownRuns(), all = DATA.panels.flatMap((panel) => chartsOf(panel, runs));
  const moving = all.filter((chart) => !chart.lines.every(isConstant));
  const still = all.filter((chart) => chart.lines.every(isConstant));
  const [first, last] = range(all.flatMap((chart) => chart.lines.map((line) => line.steps)));
  const place = $("charts"), room = place.clientWidth;
  const columns = Math.max(1, Math.floor((room + CHART.gap) / (CHART.narrowest + CHART.gap)));
  const width = Math.max(150, Math.floor((room - CHART.gap * (columns - 1)) / columns) - CHART.inside);
  place.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  const charts = moving.map((chart) => drawChart(chart, first, last, width));
  place.replaceChildren(...charts.map((c) => c.chart));
  if (!all.length) place.textContent = "No step has been logged yet.";
  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", (event) => { const step = chart.stepAt(event); charts.forEach((c) => c.read(step)); });
    chart.svg.addEventListener("pointerleave", () => charts.forEach((c) => c.read(null)));
  }
  const lines = still.flatMap((chart) => runs.length > 1 || chart.lines.length === 1
    ? [[chart.title, constantText(chart)]]
    : chart.lines.map((line) => [`${chart.title}: ${line.label}`, number(line.values[0])]));
  $("constant").hidden = !lines.length;
  if (!moving.length) $("constant").open = true;
  $("constant").replaceChildren(
    element("summary", {}, `${lines.length} ${lines.length === 1 ? "metric" : "metrics"} with one constant value`),
    terms(lines, { class: "facts" }));
}
