// The top of the page: how each run went, with what settings, and which runs the charts show.

function change({ title, start, end, over }) {
  const means = over > 1 ? `means of the first and the last ${over} steps` : "first and last value";
  const text = start === end ? number(end) : `${number(start)} → ${number(end)}`;
  return element("div", { title: means }, element("span", {}, title), element("b", {}, text));
}

function card(run, place) {
  const parts = [
    element("h2", {}, swatch(place), run.name),
    element("div", { class: "changes" }, ...run.changes.map(change)),
    terms(run.facts),
    ...run.notes.map((note) => element("p", { class: "note" }, note))];
  if (run.own.length) parts.push(element("details", { open: "" }, element("summary", {}, "own settings"), terms(run.own)));
  if (run.file) parts.push(element("details", {}, element("summary", {}, "all settings"), element("pre", {}, run.file)));
  return element("article", { class: "run" }, ...parts);
}

function drawOverview() {
  $("title").textContent = DATA.title;
  $("runs").append(...RUNS.map(card));
  $("common").hidden = !DATA.settings.length;
  $("common").append(terms(DATA.settings));
  $("choice").append(...RUNS.map((run, place) => {
    const toggle = button([swatch(place), run.name], () => {
      run.shown = !run.shown || RUNS.every((other) => other === run || !other.shown); // at least one
      toggle.setAttribute("aria-pressed", run.shown);
      drawCharts();
    }, { "aria-pressed": run.shown });
    return toggle;
  }));
}
