// The page as a whole: what is shown at first, and what the controls and keys do.

function openRun(place, first = instructive) {
  readRun(place);
  at.step = at.sort = "";
  at.down = true;
  $("run").value = place;
  $("toolbar").hidden = $("columns").hidden = $("keys").hidden = !rows.length;
  $("none").hidden = rows.length > 0;
  if (!rows.length) return;
  at.place = first();
  drawFilters();
  measure();
  refresh();
}

// The same rollout of another step, or the first that the list has of it.
function toStep(step) {
  const { group, index } = rows[at.place], own = rows.filter((row) => row.step === step);
  const passing = own.filter(inRange), found = passing.length ? passing : own;
  if (at.step !== "") at.step = step;
  at.place = (found.find((row) => row.group === group && row.index === index) || found[0]).place;
  refresh();
}

function move(by) {
  const all = steps(), next = all[all.indexOf(rows[at.place].step) + by];
  if (next !== undefined) toStep(next);
}

function next(by) {
  const row = listed[listed.findIndex((row) => row.place === at.place) + by];
  if (row) { at.place = row.place; show(); }
}

// #run/step/prompt/index/colour: a rollout to send to somebody.
function address() {
  const rollout = rollouts[at.place];
  return `#${[at.run, rollout.step, rollout.group, rollout.index ?? 0, at.mode].join("/")}`;
}

function openAddress() {
  const [place, step, group, index, mode] = location.hash.slice(1).split("/");
  if (mode) at.mode = decodeURIComponent(mode);
  const withRollouts = RUNS.filter((run) => run.rollouts.length), first = withRollouts.find((run) => run.shown);
  openRun(RUNS[place] ? Number(place) : (first || withRollouts[0] || RUNS[RUNS.length - 1]).place, () => {
    const found = rows.find((row) => row.step == step && row.group == group && row.index == index);
    return found ? found.place : instructive();
  });
}

drawOverview();
drawChoice(drawCharts);
drawCharts();
$("run").append(...RUNS.filter((run) => run.rollouts.length).map((run) => element("option", { value: run.place }, run.name)));
$("run-field").hidden = $("run").children.length < 2;
$("run").onchange = (event) => { openRun(Number(event.target.value)); event.target.blur(); };
$("step").onchange = (event) => {
  at.step = event.target.value === "" ? "" : Number(event.target.value);
  refresh();
  event.target.blur();
};
$("step-back").onclick = () => move(-1);
$("step-on").onclick = () => move(1);
$("clear").onclick = clearFilters;
$("to-rollouts").onclick = () => $("reader").scrollIntoView();
$("strip").onclick = (event) => goTo(event.offsetX / event.target.clientWidth);
document.addEventListener("pointermove", tip);
addEventListener("scroll", () => { $("tip").hidden = true; }, { passive: true });
let width = innerWidth;
addEventListener("resize", () => {
  if (width === innerWidth) return;
  width = innerWidth;
  drawCharts();
  if (listed.length) paint(rollouts[at.place]);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "INPUT"].includes(event.target.tagName) || !listed.length) return;
  if (event.key === "ArrowRight" || event.key === "ArrowLeft") next(event.key === "ArrowRight" ? 1 : -1);
  else if (event.key === "[" || event.key === "]") move(event.key === "]" ? 1 : -1);
  else if (event.key === "p") $("prompt").open = !$("prompt").open;
  else if (/^[1-9]$/.test(event.key)) { const choice = $("modes").children[event.key - 1]; if (choice) choice.click(); }
  else return;
  event.preventDefault();
});
openAddress();
touched = true;
