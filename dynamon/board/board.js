// The board: views of one run or several, in the theme of the reader.
//
// A run is {label, lastStep, loss, findings, checks, quantities, shown, scalar, table}: the tag of the training loss or
// null, what health found and what it checked or null while it is looked for, `shown` the {words, scale, rows} of those of `quantities` that dynamon knows, a
// Map, `scalar(tag)` the series {steps, values} or null, `await table(quantity)` a quantity of `quantities` as
// {steps, layers, values (row by row), total}, `await progress()` what `dynamon.board.progress` says of it or null.

import { Axis } from "./axis.js";
import { el } from "./dom.js";
import { layers } from "./layers.js";
import { decoded, stepText } from "./numbers.js";
import { Place, listed, numbered } from "./place.js";
import { progress } from "./progress.js";
import { MOST_RUNS, sweepView } from "./sweep.js";
import { spikesOf } from "./spikes.js";
import { empty, health, rates, stability, stepsOf } from "./views.js";

const VIEWS = [
  ["runs", "Runs", sweepView],
  ["stability", "1 Stability", stability],
  ["layers", "2 Layers", layers],
  ["progress", "3 Progress", progress],
  ["rates", "4 Rates", rates],
  ["health", "5 Health", health],
];
const GESTURES =
  "Drag to zoom, Shift + drag to move, double-click for the whole run. Keys on a chart: ← → step, + − zoom, 0 the whole run.";
const PATIENCE = 15000; // milliseconds for which an open list of choices is left alone

/** A run out of what `dynamon.board.payload` makes; arrays are unpacked when they are asked for. */
export function packed(run) {
  const cache = new Map();
  const once = (key, make) => cache.get(key) ?? cache.set(key, make()).get(key);
  const scalars = new Map(Object.entries(run.scalars));
  const tables = new Map(Object.entries(run.tables));
  return {
    label: run.name,
    lastStep: run.last_step,
    loss: run.loss,
    findings: run.findings,
    checks: run.checks,
    quantities: [...tables.keys()].sort(),
    shown: new Map(Object.entries(run.shown ?? {})),
    scalar: (tag) => (scalars.has(tag) ? once(`s ${tag}`, () => unpackedScalar(scalars.get(tag))) : null),
    table: async (quantity) => once(`t ${quantity}`, () => unpackedTable(tables.get(quantity))),
    progress: async () => once("progress", () => run.progress && unpackedProgress(run.progress)),
  };
}

export function unpackedScalar({ steps, values, total }) {
  return { steps: decoded(steps, "f8"), values: decoded(values, "f8"), total };
}

export function unpackedTable({ steps, values, layers, total }) {
  return { steps: decoded(steps, "f8"), values: decoded(values, "f4"), layers, total };
}

export function unpackedProgress({ steps, values, errors, total, low, high, overshoot, ...rest }) {
  const wide = Object.entries({ steps, total, low, high, overshoot }).map(([key, text]) => [key, decoded(text, "f8")]);
  return { ...rest, ...Object.fromEntries(wide), values: decoded(values, "f4"), errors: decoded(errors, "f4") };
}

/**
 * Fill an element with the board. options: controls, an element for the header; hasTheme, whether the reader chooses the
 * theme here; notice; sweep, all runs there are to choose from: {count(), rows() (a promise of their summaries),
 * choose(names)}. Returns `update(runs, notice)`, which shows other runs or what is new in them, and instead of them a
 * notice [title, lines ...] where there is one; `examined()`, for when their findings are there; and `tick()`, for when
 * other runs may have changed, the promise of whether some are not read yet.
 */
export function mount(root, runs, { controls = null, hasTheme = true, notice = null, sweep = null, view = "stability" } = {}) {
  const place = new Place();
  const state = {
    view, smoothing: 0, charts: {}, cell: {}, map: "viridis", density: "auto", folded: new Set(), chosen: new Set(),
    axis: new Axis(() => moved()),
  };
  const { axis } = state;
  const panel = el("main", { role: "tabpanel", id: "panel", tabindex: -1 });
  const tabs = VIEWS.map(([key, title]) =>
    el("button", { role: "tab", id: `tab-${key}`, "aria-controls": "panel", onclick: () => show(key) }, title),
  );
  const zoomed = el("span", { class: "zoomed", hidden: true });
  const tools = el("div", { class: "tools" }, el("span", { class: "hint" }, GESTURES), zoomed, smoothing((values) => change(values)));
  let turn = 0;
  let touchedAt = -PATIENCE;
  let written = null; // what of the place makes another entry in the browser's history
  let later = 0;
  for (const kind of ["pointerdown", "keydown"]) panel.addEventListener(kind, () => (touchedAt = performance.now()));

  const write = () => {
    clearTimeout(later);
    if (notice || !runs.length) return;
    const entry = JSON.stringify([state.view, state.view === "layers" ? state.quantity : null, runs.map((run) => run.label)]);
    place.write(placeOf(runs, state), written !== null && written !== entry);
    written = entry;
  };
  const moved = () => {
    mark();
    clearTimeout(later);
    later = setTimeout(write, 300);
  };
  const mark = () => {
    const range = axis.range;
    zoomed.hidden = !range;
    if (range) zoomed.replaceChildren(`steps ${range[0]} to ${range[1]} `, el("button", { onclick: () => axis.zoomTo(null) }, "whole run"));
  };
  const label = () => {
    tabs.forEach((tab, i) => {
      const [key, title] = VIEWS[i];
      tab.hidden = key === "runs" && !(sweep?.count() > 1);
      tab.setAttribute("aria-selected", String(key === state.view));
      tab.tabIndex = key === state.view ? 0 : -1;
      tab.replaceChildren(title, badge(key, runs));
    });
  };
  const draw = async () => {
    const mine = (turn += 1);
    const { view } = state;
    panel.setAttribute("aria-busy", "true");
    axis.whole = stepsOf(runs);
    axis.marks = spikesOf(runs);
    mark();
    label();
    panel.setAttribute("aria-labelledby", `tab-${view}`);
    let node;
    try {
      node = notice ? empty(...notice) : await VIEWS.find(([key]) => key === view)[2](runs, state, { open, change, sweep });
    } catch (error) {
      node = empty("This view could not be drawn", String(error.message ?? error));
    }
    if (mine !== turn) return;
    swap(panel, node);
    axis.prune();
    tools.hidden = !panel.querySelector(".plot");
    root.dataset.view = view;
    write();
    afterPaint(() => {
      performance.mark(`dynamon ${view}`); // in the browser's timeline, for those who measure
      if (mine === turn) panel.setAttribute("aria-busy", "false");
    });
  };
  const show = (view) => {
    state.view = view;
    return draw();
  };
  const change = (values) => {
    Object.assign(state, values);
    return draw();
  };
  const open = async (view, quantity, names, run) => {
    if (quantity) Object.assign(state, { quantity, run: runs.indexOf(run), scale: null, chosen: new Set(names) });
    await show(view);
    tabs[VIEWS.findIndex(([name]) => name === view)].focus();
  };
  const go = (values) => {
    Object.assign(state, stateOf(values, state));
    const names = listed(values, "run");
    written = null; // it is in the history already
    if (sweep && names.length && names.join() !== runs.map((run) => run.label).join()) sweep.choose(names);
    else draw();
  };
  place.follow(go, () => write());
  Object.assign(state, stateOf(place.read() ?? {}, state));
  const list = el("div", { role: "tablist", "aria-label": "views" }, tabs);
  list.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const there = tabs.filter((tab) => !tab.hidden);
    const next = there[(there.indexOf(document.activeElement) + by + there.length) % there.length];
    show(VIEWS[tabs.indexOf(next)][0]);
    next.focus();
    event.preventDefault();
  });
  const names = runs.map((run) => run.label).join(", ");
  const name = controls ?? el("span", { class: "run", title: names }, names);
  root.replaceChildren(
    el("header", {}, el("h1", {}, "dynamon "), name, list, hasTheme ? themeSwitch() : null),
    tools,
    panel,
  );
  draw();
  const update = (others, instead = null) => {
    const isChoosing = panel.contains(document.activeElement) && document.activeElement.tagName === "SELECT";
    runs = others;
    notice = instead;
    if (!controls) name.textContent = name.title = runs.map((run) => run.label).join(", ");
    if (!isChoosing || performance.now() - touchedAt > PATIENCE) draw(); // a list of choices would close
  };
  const tick = async () => {
    label();
    if (state.view !== "runs") return false;
    const rows = await sweep.rows();
    if (JSON.stringify(rows) !== state.rows) await draw();
    return rows.some((row) => row.share < 1);
  };
  return { update, tick, examined: () => (state.view === "health" ? draw() : label()) };
}

/** Fill an element with the board of a report: the runs packed in it, of which the first ones are shown. */
export function mountReport(root, packs) {
  const all = packs.map(packed);
  const named = new Set(listed(new Place().read() ?? {}, "run"));
  const chosen = all.filter((run) => named.has(run.label));
  const sweep = {
    count: () => all.length,
    rows: async () => packs.map((pack) => pack.summary),
    choose: (names) => board.update(names.flatMap((name) => all.filter((run) => run.label === name)).slice(0, MOST_RUNS)),
  };
  const board = mount(root, (chosen.length ? chosen : all).slice(0, MOST_RUNS), { sweep, view: all.length > 2 ? "runs" : "stability" });
}

/** The place of the address for what is shown. */
function placeOf(runs, state) {
  const { view, axis } = state;
  return {
    view,
    ...numbered("run", runs.map((run) => run.label)),
    ...(view === "layers" && state.quantity ? { quantity: state.quantity } : {}),
    ...(view === "layers" ? numbered("layer", [...state.chosen]) : {}),
    ...(axis.range ? { steps: axis.range.join("-") } : {}),
    ...(axis.step === null ? {} : { step: stepText(axis.step) }),
  };
}

/** What a place changes in the state; the axis at once. */
function stateOf(values, state) {
  const range = /^(\d+)-(\d+)$/.exec(values.steps ?? "");
  state.axis.range = range && Number(range[1]) < Number(range[2]) ? [Number(range[1]), Number(range[2])] : null;
  state.axis.step = /^\d+$/.test(values.step ?? "") ? Number(values.step) : null;
  const layers = values.view === "layers" ? { chosen: new Set(listed(values, "layer")), quantity: values.quantity ?? state.quantity } : {};
  return { view: VIEWS.some(([key]) => key === values.view) ? values.view : state.view, ...layers };
}

/** Put a node in the place of what is there, and keep the place scrolled to and the focus. */
function swap(panel, node) {
  const path = [];
  for (let at = document.activeElement; at !== panel && panel.contains(at); at = at.parentNode) {
    path.unshift([...at.parentNode.children].indexOf(at));
  }
  panel.style.minHeight = `${panel.offsetHeight}px`; // charts have their height only once they know their width
  panel.replaceChildren(node);
  requestAnimationFrame(() => requestAnimationFrame(() => (panel.style.minHeight = "")));
  if (!path.length) return;
  let at = panel;
  for (const index of path) at = at?.children[index];
  at?.focus({ preventScroll: true });
}

/** Act once what was just drawn is on the screen. */
function afterPaint(act) {
  requestAnimationFrame(() => setTimeout(act));
}

function badge(key, runs) {
  const count = runs.flatMap((run) => run.findings ?? []).filter((finding) => finding.severity !== "note").length;
  return key === "health" && count ? el("span", { class: "badge" }, String(count)) : "";
}

function smoothing(change) {
  const shown = el("output", {}, "0");
  const range = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0 });
  range.addEventListener("input", () => {
    shown.textContent = range.value;
    change({ smoothing: Number(range.value) });
  });
  return el("label", { class: "smoothing" }, "smoothing ", range, " ", shown);
}

function themeSwitch() {
  const page = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (page.dataset.theme ? page.dataset.theme === "dark" : system.matches);
  const button = el("button", { class: "theme" });
  const label = () => (button.textContent = isDark() ? "light theme" : "dark theme");
  button.addEventListener("click", () => {
    page.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  system.addEventListener("change", label);
  label();
  return button;
}
