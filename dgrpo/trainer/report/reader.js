// The reader: one completion, its tokens coloured by a value that the run recorded of them.

const SHOWN = 6000; // tokens drawn at once
const SAMPLED = 200000; // tokens that the scale of a colour is taken from

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

let tokens = [], scales = {}, touched = false; // touched: since the page was opened

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

// The scale of a mode is that of the whole run, so that steps compare: the 99th percentile of an
// even choice of its tokens.
function measure() {
  scales = {};
  const every = Math.ceil(rows.reduce((sum, row) => sum + row.length, 0) / SAMPLED);
  for (const [key, , kind] of MODES) {
    const sizes = [];
    let count = 0, told = false;
    for (const rollout of rollouts)
      for (let i = 0; i < rollout.text.length; i++) {
        const value = valueOf(rollout, key, i);
        if (value === null) continue;
        const size = Math.abs(kind === "around one" ? Math.log(Math.max(value, 1e-9)) : value);
        told ||= size > 0;
        if (count++ % every === 0) sizes.push(size);
      }
    if (!told) continue; // the same for all tokens: no colour to choose
    const sorted = Float64Array.from(sizes).sort();
    scales[key] = sorted[Math.floor(0.99 * (sorted.length - 1))] || sorted[sorted.length - 1] || 1;
  }
}

function legend() {
  const kind = (MODES.find((m) => m[0] === at.mode) || [])[2], scale = scales[at.mode] || 1, place = $("legend");
  const bar = (stops) => element("span", { class: "bar", style: `background:linear-gradient(90deg, ${stops})` });
  const strong = (c) => `rgb(${c.join(" ")} / .75)`;
  if (!kind) place.replaceChildren();
  else if (kind === "flag") place.replaceChildren(element("i", { class: "swatch", style: `background:${strong(WARM)}` }), "the ratio is clipped");
  else if (kind === "from zero") place.replaceChildren("0", bar(`transparent, ${strong(WARM)}`), `≥ ${number(scale)} nats`);
  else if (kind === "up to zero") place.replaceChildren("0", bar(`transparent, ${strong(WARM)}`), `≤ −${number(scale)}`);
  else {
    const [low, high] = kind === "around one" ? [Math.exp(-scale), Math.exp(scale)] : [-scale, scale];
    place.replaceChildren(`≤ ${number(low)}`, bar(`${strong(COLD)}, transparent, ${strong(WARM)}`), `≥ ${number(high)}`);
  }
}

function drawModes() {
  const known = MODES.filter(([key]) => scales[key]);
  if (!known.some(([key]) => key === at.mode)) at.mode = known.length ? known[0][0] : "";
  $("modes").replaceChildren(...known.map(([key, title], i) => {
    return button(title, () => { at.mode = key; show(); }, { role: "radio", "aria-checked": key === at.mode, title: `key ${i + 1}` });
  }));
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
  $("facts").replaceChildren(...terms(facts.map(([name, value]) => [name, String(value)])).children);
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
  mark();
  drawFacts(rollout);
  const prompt = String(rollout.prompt ?? "");
  $("prompt").querySelector("summary").replaceChildren(
    `prompt, ${rollout.prompt_tokens ?? "?"} tokens`, element("span", { dir: "auto" }, `… ${prompt.slice(-80).trim()}`));
  $("prompt").querySelector("pre").textContent = prompt;
  drawText(rollout);
  paint(rollout);
  $("tip").hidden = true;
  if (touched) history.replaceState(null, "", address());
}

