// The tab in TensorBoard: which runs to show, and what is new in them every few seconds.

import { mount, unpackedProgress, unpackedScalar, unpackedTable } from "./board.js";
import { el } from "./dom.js";
import { Place, listed } from "./place.js";
import { MOST_RUNS } from "./sweep.js";
import { ADD } from "./views.js";

const EVERY = 2500; // milliseconds between two questions
const NONE = ""; // the name of no run
const MORE = "\n"; // stands for several, which the view of all runs chose
const UNREAD = "The event files hold no readings: the run has only just begun, or they are damaged or of another kind.";

/** TensorBoard calls this in the frame of the tab. */
export async function render() {
  document.documentElement.lang = "en";
  const style = el("link", { rel: "stylesheet", href: "./board.css" });
  const styled = new Promise((done) => style.addEventListener("load", done));
  document.head.append(style);
  const root = el("div", { id: "board" });
  document.body.append(root);
  const follows = followTheme();
  await styled;
  const status = el("span", { class: "hint", role: "status" });
  const warning = el("span", { class: "hint", role: "alert" });
  const first = el("select", { "aria-label": "run", onchange: () => choose([first.value, ...chosen.slice(1)]) });
  const second = el("select", { "aria-label": "run to compare with", onchange: () => choose([chosen[0], second.value]) });
  const controls = el("span", { class: "runs" }, el("label", {}, "run ", first), el("label", {}, "compare with ", second), status, warning);
  let chosen = listed(new Place().read() ?? {}, "run").slice(0, MOST_RUNS);
  let known = [];
  let lost = ""; // runs of the address that are not there
  const choose = (names) => {
    lost = "";
    chosen = [...new Set(names)].filter((name) => name !== NONE && name !== MORE).slice(0, MOST_RUNS);
    return poll();
  };
  const sweep = { count: () => known.length, rows: async () => (await asked("rows")).rows ?? [], choose };
  let board = null;
  const show = (runs, notice = null) => {
    if (board) board.update(runs, notice);
    else board = mount(root, runs, { controls, hasTheme: !follows, notice, sweep });
  };

  const opened = new Map();
  let timer = 0;
  let turn = 0;
  let shown = "";
  const poll = async () => {
    clearTimeout(timer);
    const mine = (turn += 1);
    let wait = EVERY;
    try {
      const isSeen = !document.hidden && window.innerHeight > 0; // 0: another tab is in front
      if (isSeen || !board) wait = await look(() => mine === turn);
    } catch (error) {
      status.textContent = "TensorBoard does not answer; trying again.";
      if (!board) show([], ["TensorBoard does not answer", String(error.message ?? error)]);
    }
    if (mine === turn) timer = setTimeout(poll, wait);
  };

  /** Ask for the runs and for what is new in those chosen; milliseconds until it should be asked again. */
  const look = async (isCurrent) => {
    const { runs: names, folder, unread, problem } = await asked("runs");
    if (!isCurrent()) return EVERY;
    controls.hidden = Boolean(problem) || !names.length;
    if (controls.hidden) {
      shown = "";
      status.textContent = "";
      show([], problem ? ["Nothing to show here", problem] : nothing(folder, unread));
      return EVERY;
    }
    known = names;
    const gone = chosen.filter((name) => !names.includes(name));
    chosen = chosen.filter((name) => names.includes(name));
    if (gone.length) lost = `There is no ${gone.join(", ")} here. `;
    if (!chosen.length) chosen = [names[0]];
    fill(first, names, chosen[0]);
    const others = names.filter((name) => name !== chosen[0]);
    const several = chosen.length > 2 ? [MORE] : [];
    fill(second, [NONE, ...several, ...others], several[0] ?? chosen[1] ?? NONE, `${chosen.length - 1} runs`);
    for (const name of chosen) if (!opened.has(name)) opened.set(name, new Live(name));
    const runs = chosen.map((name) => opened.get(name));
    await Promise.all(runs.map((run) => run.refresh()));
    if (!isCurrent()) return 0;
    const isUnread = runs.every((run) => run.share === 1 && run.lastStep < 0);
    const failed = runs.find((run) => run.problem) ?? (isUnread ? runs[0] : null);
    if (failed) {
      shown = "";
      status.textContent = "";
      show([], [`${failed.label} cannot be shown`, failed.problem ?? UNREAD]);
      return EVERY;
    }
    const key = JSON.stringify(runs.map((run) => [run.label, run.epoch, run.count]));
    if (key !== shown) show(runs);
    shown = key;
    const isReading = await board.tick();
    const share = Math.min(...runs.map((run) => run.share));
    status.textContent = share < 1 ? `reading, ${Math.floor(100 * share)} % …` : `step ${Math.max(...runs.map((run) => run.lastStep))}`;
    const damage = runs.flatMap((run) => run.damage);
    warning.textContent = lost + (damage.length ? `${damage.length} part${damage.length > 1 ? "s" : ""} of the event files cannot be read` : "");
    warning.title = damage.join("\n");
    if (share < 1) return 0;
    const found = await Promise.all(runs.map((run) => run.examine()));
    if (isCurrent() && found.some(Boolean)) board.examined();
    return isReading ? 0 : EVERY;
  };
  await poll();
}

function nothing(folder, unread) {
  if (unread) {
    const found = `${unread} folder${unread > 1 ? "s" : ""} with event files below ${folder}.`;
    return ["No run to show yet", found, UNREAD, "This page looks again every few seconds."];
  }
  return [
    "No runs yet",
    `There are no event files below ${folder}.`,
    `${ADD} and train with the TensorBoardLogger, which Lightning uses by default. This page looks again every few seconds.`,
  ];
}

/** Make the choices of a list those names, and choose one. */
function fill(select, names, current, more = "") {
  const texts = names.map((name) => (name === NONE ? "nothing" : name === MORE ? more : name));
  if (JSON.stringify([...select.options].map((option) => option.textContent)) !== JSON.stringify(texts)) {
    select.replaceChildren(...names.map((name, i) => el("option", { value: name }, texts[i])));
  }
  select.value = current;
}

async function asked(question, values = {}) {
  const response = await fetch(`./${question}?${new URLSearchParams(values)}`);
  if (!response.ok) throw new Error(`${question}: ${response.status}`);
  return response.json();
}

/** A run that is read from the server piece by piece; see `mount` for its properties. */
class Live {
  constructor(name) {
    Object.assign(this, { label: name, problem: null, findings: null, checks: null, share: 0, damage: [] });
    this.forget(0);
  }

  forget(epoch) {
    Object.assign(this, { epoch, count: 0, lastStep: 0, loss: null, quantities: [], shown: new Map(), examined: -1 });
    [this.scalars, this.tables] = [new Map(), new Map()];
  }

  /** Read on; what is new is in `count`. */
  async refresh() {
    const news = await asked("run", { run: this.label, epoch: this.epoch, since: this.count });
    this.problem = news.problem ?? null;
    if (this.problem) return;
    Object.assign(this, { share: news.share, damage: news.damage ?? [] });
    if (!news.scalars) return;
    if (news.epoch !== this.epoch) this.forget(news.epoch);
    for (const [tag, part] of Object.entries(news.scalars)) this.scalars.set(tag, appended(this.scalars.get(tag), unpackedScalar(part), part.from));
    const shown = new Map(Object.entries(news.shown ?? {}));
    Object.assign(this, { count: news.count, lastStep: news.last_step, loss: news.loss, quantities: news.quantities.sort(), shown });
  }

  /** Look for what is wrong; true if that was done anew. */
  async examine() {
    if (this.examined === this.count) return false;
    const { count } = this;
    const { findings, checks, problem } = await asked("health", { run: this.label });
    if (problem) return false;
    [this.findings, this.checks, this.examined] = [findings, checks, count];
    return true;
  }

  scalar(tag) {
    return this.scalars.get(tag) ?? null;
  }

  async progress() {
    if (!this.quantities.includes("progress/decrease")) return null;
    if (this.summed?.epoch !== this.epoch || this.summed.count !== this.count) {
      const { epoch, count } = this;
      const { progress, problem } = await asked("progress", { run: this.label });
      if (problem) throw new Error(problem);
      this.summed = { epoch, count, found: progress && unpackedProgress(progress) };
    }
    return this.summed.found;
  }

  async table(quantity) {
    const known = this.tables.get(quantity);
    if (known && known.epoch === this.epoch && known.count === this.count) return known.table;
    const has = known ? { epoch: known.epoch, since: known.count } : {};
    const news = await asked("table", { run: this.label, quantity, ...has });
    if (news.problem) throw new Error(news.problem);
    const table = news.values === undefined ? known.table : appended(known?.table, unpackedTable(news), news.from);
    this.tables.set(quantity, { epoch: news.epoch, count: news.count, table });
    return table;
  }
}

/** A series with new points behind those it has; the new ones alone where they do not begin at `from`. */
function appended(old, part, from) {
  if (from === undefined || !old) return part;
  const joined = (a, b) => {
    const both = new a.constructor(a.length + b.length);
    both.set(a);
    both.set(b, a.length);
    return both;
  };
  return { ...part, steps: joined(old.steps, part.steps), values: joined(old.values, part.values) };
}

/** Take TensorBoard's theme; false where its page is out of reach. */
function followTheme() {
  if (window.parent === window) return false;
  try {
    const { body } = window.parent.document;
    const take = () => (document.documentElement.dataset.theme = body.classList.contains("dark-mode") ? "dark" : "light");
    new MutationObserver(take).observe(body, { attributes: true, attributeFilter: ["class"] });
    take();
    return true;
  } catch {
    return false;
  }
}
