// The list of a run's rollouts: filtered, sorted, and which of them is opened first.

const COLUMNS = [["reward", "reward"], ["length", "tokens"], ["divergence", "KL"]];
const CHUNK = 300; // rows drawn at once
const READABLE = 2000; // tokens of a completion that can be read in one go

const at = { run: 0, step: "", sort: "", down: true, mode: "divergence", place: 0 };
let rollouts = [], rows = [], listed = [];

function valueOf(rollout, key, i) {
  const values = rollout[key];
  if (values === undefined || values === null) return null;
  return Array.isArray(values) ? values[i] ?? null : values;
}

// The mean over the tokens with loss; null where no token has a value.
function mean(rollout, key) {
  let total = 0, count = 0;
  for (let i = 0; i < rollout.text.length; i++) {
    const value = valueOf(rollout, key, i);
    if (value !== null && valueOf(rollout, "loss", i) !== 0) { total += Number(value); count++; }
  }
  return count ? total / count : null;
}

function readRun(place) {
  at.run = place;
  rollouts = RUNS[place].rollouts;
  rows = rollouts.map((r, i) => ({
    place: i, step: r.step, group: r.group, index: r.index ?? 0,
    reward: typeof r.reward === "number" ? r.reward : null, length: r.text.length, divergence: mean(r, "divergence"),
  }));
}

function isReadable(rollout) {
  if (rollout.text.length < 2 || rollout.text.length > READABLE) return false;
  const text = rollout.text.join("");
  return /[\p{L}\p{N}]/u.test(text) && (text.match(/[\p{Cc}\ufffd]/gu) || []).length <= text.length / 5;
}

// Of a prompt that was solved and failed, where the teacher differs most, and readable.
function instructive() {
  const rewards = new Map();
  for (const row of rows) {
    const key = `${row.step}/${row.group}`, seen = rewards.get(key) || [Infinity, -Infinity];
    if (row.reward !== null) rewards.set(key, [Math.min(seen[0], row.reward), Math.max(seen[1], row.reward)]);
  }
  const isMixed = (row) => { const [low, high] = rewards.get(`${row.step}/${row.group}`) || [0, 0]; return low < high ? 1 : 0; };
  const order = rows.map((row) => [isMixed(row), row.divergence ?? -1, row.step, row]);
  order.sort((a, b) => b[0] - a[0] || b[1] - a[1] || b[2] - a[2]);
  const found = order.find(([, , , row]) => isReadable(rollouts[row.place])) || order[0];
  return found ? found[3].place : 0;
}

const steps = () => [...new Set(rows.map((row) => row.step))];

function inRange(row) {
  return COLUMNS.every(([key]) => {
    const low = $(`${key}-low`).value, high = $(`${key}-high`).value;
    if (low === "" && high === "") return true;
    return row[key] !== null && (low === "" || row[key] >= Number(low)) && (high === "" || row[key] <= Number(high));
  });
}

function choose() {
  listed = rows.filter((row) => (at.step === "" || row.step === at.step) && inRange(row));
  const sign = at.down ? -1 : 1;
  if (at.sort) listed.sort((a, b) => {
    const left = a[at.sort], right = b[at.sort];
    if (left === null || right === null) return (left === null) - (right === null); // unknown ones last
    return sign * (left - right) || a.place - b.place;
  });
}

function drawHeads() {
  const head = ([key, title]) => button(
    title + (at.sort === key ? (at.down ? " ↓" : " ↑") : ""),
    () => {
      if (at.sort === key && !at.down) at.sort = ""; // largest first, smallest first, as recorded
      else { at.down = at.sort !== key; at.sort = key; }
      refresh({ fromTop: true });
    }, { "data-sort": key, "aria-pressed": at.sort === key, title: `sort by ${title}` });
  $("heads").replaceChildren(element("span", {}, "rollout"), ...COLUMNS.map(head));
}

// The rows first … last - 1 of the list; what is before and after waits behind a button.
function drawRows(first, last) {
  const items = [];
  let group = "";
  const rest = (count, what, draw) => count > 0 && items.push(element("li", {}, button(`${count} ${what}`, draw, { class: "rest" })));
  rest(first, "before", () => drawRows(Math.max(0, first - CHUNK), last));
  for (const row of listed.slice(first, last)) {
    const own = `step ${row.step} · prompt ${row.group}`;
    if (!at.sort && own !== group) items.push(element("li", { class: "group" }, group = own));
    const pick = button("", () => { at.place = row.place; show(); }, { "data-place": row.place, "aria-pressed": row.place === at.place });
    pick.append(
      element("span", {}, at.sort ? `${row.step} · #${row.index}` : `#${row.index}`),
      ...COLUMNS.map(([key]) => element("span", {}, key === "divergence" && row[key] !== null ? String(Number(row[key].toPrecision(2))) : number(row[key]))));
    items.push(element("li", {}, pick));
  }
  rest(listed.length - last, "more", () => drawRows(first, last + CHUNK));
  $("list").replaceChildren(...items);
}

// The chosen row, in view within the list: the page itself does not move.
function mark() {
  const list = $("list"), find = () => list.querySelector(`[data-place="${at.place}"]`);
  for (const node of list.querySelectorAll("[aria-pressed=true]")) node.setAttribute("aria-pressed", "false");
  if (!find()) {
    const first = CHUNK * Math.floor(listed.findIndex((row) => row.place === at.place) / CHUNK);
    drawRows(first, first + CHUNK);
  }
  find().setAttribute("aria-pressed", "true");
  const box = list.getBoundingClientRect(), own = find().getBoundingClientRect();
  if (own.top < box.top + 24) list.scrollTop -= box.top + 24 - own.top;
  else if (own.bottom > box.bottom) list.scrollTop += own.bottom - box.bottom;
}

// The list after a change of step, filter or order; a rollout that has left it is not kept open.
function refresh({ fromTop = false } = {}) {
  choose();
  drawHeads();
  const all = steps(), now = rollouts[at.place].step;
  $("step").value = at.step;
  $("step-back").disabled = now === all[0];
  $("step-on").disabled = now === all[all.length - 1];
  $("count").textContent = listed.length === rows.length ? `${rows.length} rollouts` : `${listed.length} of ${rows.length} rollouts`;
  $("clear").hidden = !COLUMNS.some(([key]) => $(`${key}-low`).value || $(`${key}-high`).value);
  if (listed.length && (fromTop || !listed.some((row) => row.place === at.place))) at.place = listed[0].place;
  $("list").replaceChildren();
  $("rollout").hidden = $("keys").hidden = !listed.length;
  $("nothing").hidden = listed.length > 0;
  if (listed.length) show();
}

function drawFilters() {
  $("filters").replaceChildren(...COLUMNS.map(([key, title]) => {
    const known = rows.map((row) => row[key]).filter((value) => value !== null), [low, high] = range([known]);
    const input = (end, bound) => {
      const node = element("input", { type: "number", step: "any", id: `${key}-${end}`, "aria-label": `${end === "low" ? "least" : "most"} ${title}`, placeholder: number(bound) });
      node.oninput = () => refresh();
      return node;
    };
    const field = element("span", { class: "field" }, element("label", { for: `${key}-low` }, title), input("low", low), "–", input("high", high));
    field.hidden = !known.length;
    return field;
  }));
  $("step").replaceChildren(element("option", { value: "" }, "all"), ...steps().map((step) => element("option", { value: step }, step)));
}

function clearFilters() {
  for (const [key] of COLUMNS) $(`${key}-low`).value = $(`${key}-high`).value = "";
  refresh();
}
