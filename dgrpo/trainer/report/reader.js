// The reader: one completion, its tokens coloured by a value that the run recorded of them.

const same = (value) => value, negative = (value) => -value, log = (value) => Math.log(Math.max(value, 1e-9));
// Key in the record, title, strength of a value's colour, and the value of a strength.
const MODES = [
  ["divergence", "KL to teacher", same, same],
  ["advantage", "advantage", same, same],
  ["clipped", "clipped", same, same],
  ["entropy", "entropy", same, same],
  ["ratio", "ratio", log, Math.exp],
  ["logprob", "log-probability", negative, negative],
  ["teacher_logprob", "teacher’s log-probability", negative, negative],
];

const SHOWN = 6000;
let tokens = [], scales = {}, touched = false; // touched: since the page was opened

// How strong the colour of a token is, in [-1, 1]: blue below 0; 0 where it has no value.
function strength(i) {
  const mode = MODES.find(([key]) => key === at.mode), value = mode ? valueOf(at.row.rollout, at.mode, i) : null;
  return value === null ? 0 : Math.max(-1, Math.min(1, mode[2](value) / scales[at.mode].full));
}

const color = (strength) => `rgb(${strength < 0 ? "37 99 201" : "217 72 28"} / ${0.75 * Math.abs(strength)})`;

// The scale of a mode is that of the whole run, so that steps compare: the 99th percentile.
function measure() {
  scales = {};
  for (const [key, , strengthOf] of MODES) {
    const found = rows.flatMap(({ rollout }) => rollout.text.map((_, i) => valueOf(rollout, key, i)))
      .filter((value) => value !== null).map(strengthOf);
    const sizes = Float64Array.from(found, Math.abs).sort(), most = sizes[sizes.length - 1];
    // The same for all tokens: no colour to choose.
    if (most) scales[key] = { full: sizes[Math.floor(0.99 * (sizes.length - 1))] || most, low: found.some((size) => size < 0) ? -1 : 0 };
  }
}

function drawModes() {
  const known = MODES.filter(([key]) => scales[key]), mode = known.find(([key]) => key === at.mode) || known[0];
  at.mode = mode ? mode[0] : "";
  $("modes").replaceChildren(...known.map(([key, title], i) =>
    button([title], () => { at.mode = key; paint(); }, { role: "radio", "aria-checked": key === at.mode, title: `key ${i + 1}` })));
  if (!mode) return $("legend").replaceChildren();
  const { full, low } = scales[at.mode], value = (strength) => number(mode[3](strength * full));
  const bar = element("span", { class: "bar", style: `background:linear-gradient(90deg, ${color(low)}, ${low ? "transparent, " : ""}${color(1)})` });
  $("legend").replaceChildren(value(low), bar, value(1));
}

function drawFacts({ rollout, index }) {
  const facts = [["step", rollout.step], ["prompt", rollout.group], ["rollout", index], ["reward", number(rollout.reward ?? "failed or none")]];
  const parts = Object.entries(rollout.rewards || {});
  if (parts.length > 1) facts.push(...parts.map(([name, value]) => [name, number(value)]));
  for (const [key, title] of [["advantage", "advantage"], ["divergence", "mean KL"], ["entropy", "mean entropy"], ["clipped", "clipped share"]]) {
    const value = mean(rollout, key);
    if (value !== null) facts.push([title, number(value)]);
  }
  facts.push(["tokens", rollout.text.length + (rollout.finish_reason ? ` (${rollout.finish_reason})` : "")]);
  facts.push(...Object.entries(rollout.tags || {}).filter(([, value]) => value !== ""));
  $("facts").replaceChildren(terms(facts));
}

// SHOWN tokens at a time: a browser lays out a million spans in minutes.
function drawText({ rollout }, from = 0) {
  const more = rollout.text.slice(from, from + SHOWN).map((piece, k) => {
    const i = from + k, span = element("span", { "data-i": i, class: piece === "" ? "part" : "" });
    piece.split("\n").forEach((line, k) => span.append(...(k ? [element("span", { class: "newline" }, "↵"), "\n"] : []), line));
    span.classList.toggle("mute", valueOf(rollout, "loss", i) === 0);
    return span;
  });
  tokens = [...tokens.slice(0, from), ...more];
  if (!from) $("text").replaceChildren(tokens.length ? "" : "The completion is empty.");
  for (const span of more) $("text").append(span);
  const left = rollout.text.length - tokens.length;
  $("more").hidden = !left;
  $("more").textContent = `show more tokens (${left} left)`;
  $("more").onclick = () => { drawText(at.row, tokens.length); paint(); };
}

// The colours by the chosen mode, of which the address tells too.
function paint() {
  drawModes();
  const { step, group, index } = at.row;
  if (touched) history.replaceState(null, "", `#${[$("run").value, step, group, index, at.mode].join("/")}`);
  const strengths = at.row.rollout.text.map((_, i) => strength(i)), count = strengths.length;
  tokens.forEach((span, i) => { span.style.background = strengths[i] ? color(strengths[i]) : ""; });
  const { width, height } = $("strip"), pen = $("strip").getContext("2d"), wide = Math.max(1, width / count);
  pen.clearRect(0, 0, width, height);
  // The strongest last: it is what is seen where several tokens share a pixel.
  for (const i of [...strengths.keys()].sort((a, b) => Math.abs(strengths[a]) - Math.abs(strengths[b]))) {
    const place = [Math.floor(i * width / count), 0, Math.ceil(wide), height];
    pen.fillStyle = color(strengths[i]);
    pen.clearRect(...place);
    pen.fillRect(...place);
  }
}

function goTo(fraction) {
  $("text").querySelector(".here")?.classList.remove("here");
  const i = Math.floor(fraction * at.row.rollout.text.length);
  while (tokens.length <= i && !$("more").hidden) drawText(at.row, tokens.length);
  paint();
  const token = tokens[i];
  token?.classList.add("here");
  token?.scrollIntoView({ block: "center" });
}

function tip(event) {
  const span = event.target.closest?.("#text [data-i]"), box = $("tip");
  box.hidden = !span;
  if (!span) return;
  const { rollout } = at.row, i = Number(span.dataset.i), piece = rollout.text[i];
  const known = [...MODES, ["loss", "has loss"]].filter(([key]) => (rollout[key] ?? null) !== null);
  box.replaceChildren(
    element("b", {}, piece === "" ? "part of a character" : JSON.stringify(piece)),
    terms([["token", `${i + 1} of ${rollout.text.length}`], ["id", number(rollout.tokens?.[i])],
      ...known.map(([key, title]) => [title, number(valueOf(rollout, key, i))])]));
  const x = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 4), high = box.offsetHeight + 14;
  const y = event.clientY + high > innerHeight ? event.clientY - high : event.clientY + 14;
  box.style.left = `${Math.max(4, x)}px`;
  box.style.top = `${Math.max(4, y)}px`;
}

function show() {
  const { rollout, step } = at.row, steps = stepsOf(passing), prompt = String(rollout.prompt ?? "");
  $("step-back").disabled = step === steps[0];
  $("step-on").disabled = step === steps[steps.length - 1];
  mark();
  drawFacts(at.row);
  $("prompt").querySelector("summary").replaceChildren(
    `prompt, ${rollout.prompt_tokens ?? "?"} tokens`, element("span", {}, `… ${prompt.slice(-80).trim()}`));
  $("prompt").querySelector("pre").textContent = prompt;
  drawText(at.row);
  paint();
  $("tip").hidden = true;
}
