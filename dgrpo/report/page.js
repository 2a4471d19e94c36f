// The reader: one completion at a time, its tokens coloured by a value that the run recorded of them.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SHOWN = 20000; // tokens drawn at once

// key in the record, title, how it is coloured
const MODES = [
  ["divergence", "KL to teacher", "from zero"],
  ["advantage", "advantage", "around zero"],
  ["clipped", "clipped", "flag"],
  ["entropy", "entropy", "from zero"],
  ["ratio", "ratio", "around one"],
  ["logprob", "log-probability", "up to zero"],
  ["teacher_logprob", "teacher’s log-probability", "up to zero"],
];
const MORE = [["loss", "has loss"]];
const WARM = [217, 72, 28], COLD = [37, 99, 201];

const at = { stage: 0, place: 0, mode: "divergence" };
let stage, rollouts, tokens = [], scales = {};

function valueOf(rollout, key, i) {
  const values = rollout[key];
  if (values === undefined || values === null) return null;
  return Array.isArray(values) ? values[i] ?? null : values;
}

// [0, 1] strength and colour of a value; null where there is none.
function shade(mode, value) {
  if (value === null) return null;
  const kind = MODES.find((m) => m[0] === mode)[2], scale = scales[mode] || 1;
  if (kind === "flag") return value ? [1, WARM] : null;
  const signed = kind === "around one" ? Math.log(Math.max(value, 1e-9)) : kind === "up to zero" ? -value : value;
  const strength = Math.min(1, Math.abs(signed) / scale);
  return [strength, kind !== "from zero" && kind !== "up to zero" && signed < 0 ? COLD : WARM];
}

function color(mode, value) {
  const found = shade(mode, value);
  return found && found[0] > 0.01 ? `rgb(${found[1].join(" ")} / ${(0.75 * found[0]).toFixed(3)})` : "";
}

// The scale of a mode is that of the whole stage, so that steps compare: the 99th percentile.
function measure() {
  scales = {};
  for (const [key, , kind] of MODES) {
    const sizes = [];
    for (const rollout of rollouts)
      for (let i = 0; i < rollout.text.length; i += 1 + (rollout.text.length >> 11)) {
        const value = valueOf(rollout, key, i);
        if (value !== null) sizes.push(Math.abs(kind === "around one" ? Math.log(Math.max(value, 1e-9)) : value));
      }
    if (!sizes.length) continue;
    sizes.sort((a, b) => a - b);
    scales[key] = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
  }
}

function legend() {
  const kind = (MODES.find((m) => m[0] === at.mode) || [])[2], scale = scales[at.mode] || 1, place = $("legend");
  const bar = (stops) => element("span", { class: "bar", style: `background:linear-gradient(90deg, ${stops})` });
  const strong = (c) => `rgb(${c.join(" ")} / .75)`;
  if (!kind) place.replaceChildren();
  else if (kind === "flag") place.replaceChildren(element("i", { style: `background:${strong(WARM)}` }), "the ratio is clipped");
  else if (kind === "from zero") place.replaceChildren("0", bar(`transparent, ${strong(WARM)}`), `≥ ${number(scale)} nats`);
  else if (kind === "up to zero") place.replaceChildren("0", bar(`transparent, ${strong(WARM)}`), `≤ −${number(scale)}`);
  else {
    const [low, high] = kind === "around one" ? [Math.exp(-scale), Math.exp(scale)] : [-scale, scale];
    place.replaceChildren(`≤ ${number(low)}`, bar(`${strong(COLD)}, transparent, ${strong(WARM)}`), `≥ ${number(high)}`);
  }
}

function drawModes() {
  const known = MODES.filter(([key]) => rollouts.some((r) => r[key] !== undefined && r[key] !== null));
  if (!known.some(([key]) => key === at.mode)) at.mode = known.length ? known[0][0] : "";
  $("modes").replaceChildren(...known.map(([key, title], i) => {
    const button = element("button", { role: "radio", "aria-checked": key === at.mode, title: `key ${i + 1}` }, title);
    button.onclick = () => { at.mode = key; show(); };
    return button;
  }));
}

function steps() { return [...new Set(rollouts.map((r) => r.step))]; }

function drawList() {
  const step = rollouts[at.place].step, all = steps();
  $("step").replaceChildren(...all.map((s) => element("option", s === step ? { selected: "", value: s } : { value: s }, s)));
  $("step-back").disabled = step === all[0];
  $("step-on").disabled = step === all[all.length - 1];
  const items = [];
  let group = null;
  rollouts.forEach((rollout, place) => {
    if (rollout.step !== step) return;
    if (rollout.group !== group) items.push(element("li", { class: "group" }, `prompt ${(group = rollout.group)}`));
    const reward = rollout.reward === null || rollout.reward === undefined ? "no reward" : number(rollout.reward);
    const button = element("button", { "aria-pressed": place === at.place },
      element("span", {}, `#${rollout.index ?? 0}`), element("span", { class: "reward" }, reward), element("span", {}, `${rollout.text.length} tok`));
    button.onclick = () => { at.place = place; show(); };
    items.push(element("li", {}, button));
  });
  $("list").replaceChildren(...items);
  $("list").querySelector("[aria-pressed=true]").scrollIntoView({ block: "nearest" });
}

function mean(rollout, key) {
  let total = 0, count = 0;
  for (let i = 0; i < rollout.text.length; i++) {
    const value = valueOf(rollout, key, i);
    if (value !== null && valueOf(rollout, "loss", i) !== 0) { total += Number(value); count++; }
  }
  return count ? total / count : null;
}

function drawFacts(rollout) {
  const facts = [["step", rollout.step], ["prompt", rollout.group], ["rollout", rollout.index ?? 0]];
  facts.push(["reward", rollout.reward === null || rollout.reward === undefined ? "failed or none" : number(rollout.reward)]);
  const parts = Object.entries(rollout.rewards || {});
  if (parts.length > 1) for (const [name, value] of parts) facts.push([name, number(value)]);
  for (const [key, title] of [["advantage", "advantage"], ["divergence", "mean KL"], ["entropy", "mean entropy"]]) {
    const value = mean(rollout, key);
    if (value !== null) facts.push([title, number(value)]);
  }
  const clipped = mean(rollout, "clipped");
  if (clipped !== null) facts.push(["clipped", `${number(100 * clipped)} %`]);
  facts.push(["tokens", `${rollout.text.length}${rollout.finish_reason ? ` (${rollout.finish_reason})` : ""}`]);
  if (rollout.answer) facts.push(["answer", rollout.answer]);
  for (const [name, value] of Object.entries(rollout.tags || {})) if (value !== "") facts.push([name, String(value)]);
  $("facts").replaceChildren(...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

function drawText(rollout, from = 0) {
  const end = Math.min(rollout.text.length, from + SHOWN), place = $("text");
  if (from === 0) { place.replaceChildren(); tokens = []; }
  const nodes = document.createDocumentFragment();
  for (let i = from; i < end; i++) {
    const span = element("span"), piece = rollout.text[i];
    span.dataset.i = i;
    if (piece === "") span.className = "part";
    else piece.split("\n").forEach((line, k) => {
      if (k) span.append(element("span", { class: "newline" }, "↵"), "\n");
      if (line) span.append(line);
    });
    if (valueOf(rollout, "loss", i) === 0) span.classList.add("mute");
    tokens.push(span);
    nodes.append(span);
  }
  place.append(nodes);
  if (!rollout.text.length) place.append(element("span", { class: "empty" }, "The completion is empty."));
  const left = rollout.text.length - end;
  $("more").hidden = left <= 0;
  $("more").textContent = `show ${Math.min(left, SHOWN)} of ${left} more tokens`;
  $("more").onclick = () => { drawText(rollout, end); paint(rollout); };
}

function paint(rollout) {
  tokens.forEach((span, i) => { span.style.background = at.mode ? color(at.mode, valueOf(rollout, at.mode, i)) : ""; });
  const canvas = $("strip"), count = rollout.text.length, width = (canvas.width = canvas.clientWidth || 800);
  const pen = canvas.getContext("2d"), wide = Math.min(width, count);
  pen.clearRect(0, 0, width, canvas.height);
  for (let x = 0; at.mode && x < wide; x++) { // the strongest token of those below a pixel
    let best = null;
    for (let i = Math.floor(x * count / wide); i < Math.floor((x + 1) * count / wide); i++) {
      const found = shade(at.mode, valueOf(rollout, at.mode, i));
      if (found && (!best || found[0] > best[0])) best = found;
    }
    if (!best) continue;
    pen.fillStyle = `rgb(${best[1].join(" ")} / ${best[0].toFixed(3)})`;
    const left = Math.floor(x * width / wide);
    pen.fillRect(left, 0, Math.ceil((x + 1) * width / wide) - left, canvas.height);
  }
}

function goTo(fraction) {
  const rollout = rollouts[at.place], i = Math.min(rollout.text.length - 1, Math.floor(fraction * rollout.text.length));
  while (tokens.length <= i) drawText(rollout, tokens.length);
  paint(rollout);
  $("text").querySelectorAll(".here").forEach((node) => node.classList.remove("here"));
  if (i >= 0) { tokens[i].classList.add("here"); tokens[i].scrollIntoView({ block: "center" }); }
}

function tip(event) {
  const span = event.target.closest ? event.target.closest("#text span[data-i]") : null, box = $("tip");
  if (!span) { box.hidden = true; return; }
  const i = Number(span.dataset.i), rollout = rollouts[at.place], table = element("table");
  const rows = [["token", `${i + 1} of ${rollout.text.length}`], ["id", rollout.tokens ? rollout.tokens[i] : "–"]];
  for (const [key, title] of [...MODES, ...MORE]) {
    if (rollout[key] === undefined || rollout[key] === null) continue;
    const value = valueOf(rollout, key, i), flag = key === "clipped" || key === "loss";
    rows.push([title, flag && value !== null ? (value ? "yes" : "no") : number(value)]);
  }
  for (const [name, value] of rows) table.append(element("tr", {}, element("td", {}, name), element("td", {}, String(value))));
  const piece = rollout.text[i];
  box.replaceChildren(element("b", {}, piece === "" ? "part of a character" : JSON.stringify(piece)), table);
  box.hidden = false;
  const gap = 14, wide = box.offsetWidth, high = box.offsetHeight;
  const x = Math.min(event.clientX + gap, innerWidth - wide - 4);
  const y = event.clientY + gap + high > innerHeight ? event.clientY - gap - high : event.clientY + gap;
  box.style.left = `${Math.max(4, x)}px`;
  box.style.top = `${Math.max(4, y)}px`;
}

function show() {
  const rollout = rollouts[at.place];
  drawModes();
  legend();
  drawList();
  drawFacts(rollout);
  $("prompt").querySelector("summary").textContent = `prompt, ${rollout.prompt_tokens ?? "?"} tokens`;
  $("prompt").querySelector("pre").textContent = rollout.prompt ?? "";
  drawText(rollout);
  paint(rollout);
  $("tip").hidden = true;
  history.replaceState(null, "", `#${[at.stage, rollout.step, rollout.group, rollout.index ?? 0, at.mode].join("/")}`);
}

function toStep(step) {
  const group = rollouts[at.place].group, index = rollouts[at.place].index;
  const own = rollouts.map((r, i) => [r, i]).filter(([r]) => r.step === step);
  at.place = (own.find(([r]) => r.group === group && r.index === index) || own[0])[1];
  show();
}

function openStage(place) {
  at.stage = place;
  stage = DATA.stages[place];
  rollouts = stage.rollouts;
  at.place = Math.max(0, rollouts.findIndex((r) => rollouts.length && r.step === rollouts[rollouts.length - 1].step));
  $("notes").textContent = stage.notes.join(" · ");
  [...$("stages").children].forEach((button, i) => button.setAttribute("aria-pressed", i === place));
  drawCharts(stage);
  $("toolbar").hidden = $("columns").hidden = $("keys").hidden = !rollouts.length;
  $("none").hidden = rollouts.length > 0;
  if (rollouts.length) { measure(); show(); }
}

$("title").textContent = DATA.title;
if (DATA.stages.length > 1) $("stages").append(...DATA.stages.map((s, i) => {
  const button = element("button", {}, s.name);
  button.onclick = () => openStage(i);
  return button;
}));

$("step").onchange = (event) => { toStep(Number(event.target.value)); event.target.blur(); };
const move = (by) => { const all = steps(), next = all[all.indexOf(rollouts[at.place].step) + by]; if (next !== undefined) toStep(next); };
$("step-back").onclick = () => move(-1);
$("step-on").onclick = () => move(1);
$("strip").onclick = (event) => goTo(event.offsetX / event.target.clientWidth);
document.addEventListener("pointermove", tip);
addEventListener("scroll", () => { $("tip").hidden = true; }, { passive: true });
addEventListener("resize", () => rollouts.length && paint(rollouts[at.place]));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT" || !rollouts.length) return;
  const last = rollouts.length - 1;
  if (event.key === "ArrowRight" && at.place < last) { at.place++; show(); }
  else if (event.key === "ArrowLeft" && at.place > 0) { at.place--; show(); }
  else if (event.key === "[" || event.key === "]") move(event.key === "]" ? 1 : -1);
  else if (event.key === "p") $("prompt").open = !$("prompt").open;
  else if (/^[1-9]$/.test(event.key)) { const button = $("modes").children[event.key - 1]; if (button) button.click(); }
  else return;
  event.preventDefault();
});

function openHash() {
  const [place, step, group, index, mode] = location.hash.slice(1).split("/");
  if (mode) at.mode = decodeURIComponent(mode);
  openStage(DATA.stages[place] ? Number(place) : DATA.stages.length - 1);
  const found = rollouts.findIndex((r) => r.step == step && r.group == group && (r.index ?? 0) == index);
  if (found >= 0) { at.place = found; show(); }
}
openHash();
