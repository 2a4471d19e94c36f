// The list of a run's rollouts: filtered, sorted, and which of them is opened first.

const COLUMNS = [["reward", "reward"], ["length", "tokens"], ["divergence", "KL"]];
const READABLE = 2000; // tokens of a completion that can be read in one go

const at = { row: null, sort: "", sign: -1, mode: "divergence" };
let rows = [], passing = [], listed = []; // all; those within the limits; of these the chosen step's, in order

function valueOf(rollout, key, i) {
  const values = rollout[key] ?? null;
  return Array.isArray(values) ? values[i] ?? null : values;
}

// The mean over the tokens with loss; null where no token has a value.
function mean(rollout, key) {
  const known = rollout.text.map((_, i) => valueOf(rollout, "loss", i) === 0 ? null : valueOf(rollout, key, i))
    .filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + Number(value), 0) / known.length : null;
}

function readRun(rollouts) {
  rows = rollouts.map((rollout, place) => ({
    rollout, place, step: rollout.step, group: rollout.group, index: rollout.index ?? 0,
    reward: typeof rollout.reward === "number" ? rollout.reward : null,
    length: rollout.text.length, divergence: mean(rollout, "divergence"),
  }));
}

function isReadable({ rollout, length }) {
  const text = length > 1 && length <= READABLE ? rollout.text.join("") : "";
  return /[\p{L}\p{N}]/u.test(text) && (text.match(/[\p{Cc}\ufffd]/gu) || []).length <= text.length / 5;
}

// Of a prompt that was solved and failed, where the teacher differs most, and readable.
function instructive() {
  const rewards = {}, prompt = (row) => `${row.step}/${row.group}`;
  for (const row of rows) if (row.reward !== null) (rewards[prompt(row)] ??= new Set()).add(row.reward);
  const mixed = (row) => rewards[prompt(row)]?.size > 1;
  const order = [...rows].sort((a, b) => mixed(b) - mixed(a) || (b.divergence ?? -1) - (a.divergence ?? -1) || b.step - a.step);
  return order.find(isReadable) || order[0];
}

const stepsOf = (rows) => [...new Set(rows.map((row) => row.step))];

function drawHeads() {
  $("heads").replaceChildren(...[["", "rollout"], ...COLUMNS].map(([key, title]) => {
    const own = key === at.sort, arrow = own && key ? (at.sign < 0 ? " ↓" : " ↑") : "";
    return button([title + arrow], () => {
      at.sign = own ? -at.sign : -1; // largest first
      at.sort = key;
      refresh(true);
    }, { "data-sort": key, "aria-pressed": own, title: key ? `sort by ${title}` : "as recorded" });
  }));
}

function drawList() {
  let group = "";
  $("list").replaceChildren(...listed.flatMap((row) => {
    const before = group, pick = button(
      [element("span", {}, at.sort ? `${row.step} · #${row.index}` : `#${row.index}`),
        ...COLUMNS.map(([key]) => element("span", {}, number(row[key], key === "divergence" ? 2 : 4)))],
      () => { at.row = row; show(); }, { "data-place": row.place });
    group = at.sort ? "" : `step ${row.step} · prompt ${row.group}`;
    return [...(group === before ? [] : [element("li", { class: "group" }, group)]), element("li", {}, pick)];
  }));
}

// The chosen row, in view within the list: the page itself does not move.
function mark() {
  const list = $("list"), row = list.querySelector(`[data-place="${at.row.place}"]`);
  list.querySelector("[aria-pressed]")?.removeAttribute("aria-pressed");
  row.setAttribute("aria-pressed", true);
  list.scrollTop = Math.max(row.offsetTop + row.offsetHeight - list.clientHeight, Math.min(list.scrollTop, row.offsetTop - 24));
}

// The list after a change of step, filter or order; a rollout that has left it is not kept open.
function refresh(fromTop = false) {
  const step = $("step").value, limits = [...new FormData($("filters"))].filter(([, text]) => text !== "");
  passing = rows.filter((row) => limits.every(([name, text]) => {
    const [key, end] = name.split("-");
    return row[key] !== null && (end === "low" ? row[key] >= Number(text) : row[key] <= Number(text));
  }));
  listed = passing.filter((row) => step === "" || row.step === Number(step));
  if (at.sort) listed.sort((a, b) => {
    const left = a[at.sort], right = b[at.sort];
    return left === null || right === null ? (left === null) - (right === null) : at.sign * (left - right); // unknown ones last
  });
  drawHeads();
  drawList();
  $("count").textContent = `${listed.length === rows.length ? "" : `${listed.length} of `}${rows.length} rollouts`;
  $("clear").hidden = !limits.length;
  $("rollout").hidden = $("keys").hidden = !listed.length;
  $("nothing").hidden = listed.length > 0;
  if (!listed.length) return;
  if (fromTop || !listed.includes(at.row)) at.row = listed[0];
  show();
}

function drawToolbar() {
  $("limits").replaceChildren(...COLUMNS.flatMap(([key, title]) => {
    const known = rows.map((row) => row[key]).filter((value) => value !== null), [low, high] = range(known);
    const input = (end, bound) => element("input", {
      type: "number", step: "any", id: `${key}-${end}`, name: `${key}-${end}`, placeholder: number(bound),
      "aria-label": `${end === "low" ? "least" : "most"} ${title}` });
    return known.length ? [element("span", {}, title, input("low", low), "–", input("high", high))] : [];
  }));
  $("step").replaceChildren(element("option", { value: "" }, "all"), ...stepsOf(rows).map((step) => element("option", {}, step)));
}
