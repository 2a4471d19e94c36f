// The page as a whole: what is shown at first, and what the controls and keys do.

function openRun(place, first = instructive) {
  $("run").value = place;
  readRun(RUNS[place].rollouts);
  $("browse").hidden = !rows.length;
  $("none").hidden = rows.length > 0;
  if (!rows.length) return;
  at.row = first();
  at.sort = "";
  drawToolbar();
  measure();
  refresh();
}

// The same rollout of the step before or after, or the first that passes the filters there.
function toStep(by) {
  const steps = stepsOf(passing), step = steps[steps.indexOf(at.row.step) + by];
  const own = passing.filter((row) => row.step === step);
  if (!own.length) return;
  at.row = own.find((row) => row.group === at.row.group && row.index === at.row.index) || own[0];
  if ($("step").value) $("step").value = step;
  refresh();
}

function next(by) {
  at.row = listed[listed.indexOf(at.row) + by] || at.row;
  show();
}

// The address names a rollout to send to somebody: #run/step/prompt/index/colour.
function openAddress() {
  const [place, step, group, index, mode] = location.hash.slice(1).split("/");
  if (mode) at.mode = mode;
  const read = RUNS.filter((run) => run.rollouts.length), first = read.find((run) => run.shown) || read[0] || RUNS[0];
  openRun(RUNS[place] ? place : RUNS.indexOf(first), () =>
    rows.find((row) => row.step == step && row.group == group && row.index == index) || instructive());
}

const KEYS = {
  ArrowLeft: () => next(-1), ArrowRight: () => next(1), "[": () => toStep(-1), "]": () => toStep(1),
  p: () => { $("prompt").open = !$("prompt").open; },
};

drawOverview();
drawCharts();
$("run").append(...RUNS.flatMap((run, value) => run.rollouts.length ? [element("option", { value }, run.name)] : []));
$("run-field").hidden = $("run").children.length < 2;
$("run").onchange = () => openRun($("run").value);
$("step").onchange = () => refresh();
$("step-back").onclick = KEYS["["];
$("step-on").onclick = KEYS["]"];
$("filters").oninput = () => refresh();
$("clear").onclick = () => { $("filters").reset(); refresh(); };
$("to-rollouts").onclick = () => $("reader").scrollIntoView();
$("strip").onclick = (event) => goTo(event.offsetX / event.target.clientWidth);
document.onpointermove = tip;
document.onscroll = () => { $("tip").hidden = true; };
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "INPUT"].includes(event.target.tagName) || !listed.length) return;
  const act = KEYS[event.key] || (event.key > 0 && (() => $("modes").children[event.key - 1]?.click()));
  if (!act) return;
  act();
  event.preventDefault();
};
openAddress();
touched = true;
