// The top of the page: how each run went, with what settings, and which runs the charts show.

const RUNS = DATA.runs;
const several = RUNS.length > 1;
const shownRuns = () => RUNS.filter((run) => run.shown);
RUNS.forEach((run, place) => { run.place = place; });

function change({ title, start, end, over }) {
  const means = over > 1 ? `means of the first and the last ${over} steps` : "first and last value";
  const text = start === end ? number(end) : `${number(start)} → ${number(end)}`;
  return element("div", { class: "change", title: means }, element("span", {}, title), element("b", {}, text));
}

// Long values each on a line of their own, after the short ones.
function settingsList(pairs) {
  const list = terms([...pairs].sort((a, b) => isLong(a) - isLong(b)), { class: "settings" });
  for (const item of list.children) item.classList.toggle("long", isLong([...item.children].map((node) => node.textContent)));
  return list;
}

const isLong = ([name, text]) => name.length + text.length > 36;

function wholeFile(run) {
  return run.file ? [element("details", {}, element("summary", {}, "all settings"), element("pre", {}, run.file))] : [];
}

function card(run) {
  const heads = several ? [element("h2", {}, swatch(run.place), run.name)] : [];
  const own = run.own.length ? [element("details", run.own.length > 6 ? {} : { open: "" }, element("summary", {}, "own settings"), settingsList(run.own))] : [];
  return element("article", { class: "run" }, ...heads,
    element("div", { class: "changes" }, ...run.changes.map(change)),
    terms(run.facts, { class: "facts" }),
    ...run.notes.map((note) => element("p", { class: "note" }, note)), ...own, ...(several ? wholeFile(run) : []));
}

function drawOverview() {
  $("title").textContent = DATA.title;
  $("runs").replaceChildren(...RUNS.map(card));
  $("runs").classList.toggle("several", several);
  $("common").hidden = !DATA.settings.length;
  $("common").replaceChildren(
    element("h2", {}, several ? "Settings of all runs" : "Settings", element("small", {}, "learning rate, batch, and what differs from the defaults")),
    settingsList(DATA.settings), ...(several ? [] : wholeFile(RUNS[0])));
}

// Which runs the charts show; at least one.
function drawChoice(changed) {
  $("choice").hidden = !several;
  $("choice").replaceChildren(...RUNS.map((run) => {
    const toggle = button("", () => {
      run.shown = !run.shown;
      if (!shownRuns().length) run.shown = true;
      toggle.setAttribute("aria-pressed", run.shown);
      changed();
    }, { "aria-pressed": run.shown, class: "chip" });
    toggle.append(swatch(run.place), run.name);
    return toggle;
  }));
}
