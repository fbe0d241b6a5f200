// The board: four views of a run or two, in the theme of the reader.

import { el } from "./dom.js";
import { decoded } from "./numbers.js";
import { health, layers, rates, stability } from "./views.js";

const VIEWS = [
  ["stability", "1 Stability", stability],
  ["layers", "2 Layers", layers],
  ["rates", "3 Rates", rates],
  ["health", "4 Health", health],
];

/** A run out of what `dynamon.board.payload` makes; arrays are unpacked when they are asked for. */
export function packed(run) {
  const cache = new Map();
  const once = (key, make) => cache.get(key) ?? cache.set(key, make()).get(key);
  const series = (found) => ({ steps: decoded(found.steps, "f8"), values: decoded(found.values, "f8"), total: found.total });
  const table = (found) => ({ ...series({ ...found, values: "" }), values: decoded(found.values, "f4"), layers: found.layers });
  const scalars = new Map(Object.entries(run.scalars));
  const tables = new Map(Object.entries(run.tables));
  return {
    label: run.name,
    lastStep: run.last_step,
    loss: run.loss,
    findings: run.findings,
    quantities: [...tables.keys()].sort(),
    scalar: (tag) => (scalars.has(tag) ? once(`s ${tag}`, () => series(scalars.get(tag))) : null),
    table: async (quantity) => once(`t ${quantity}`, () => table(tables.get(quantity))),
  };
}

/** Fill an element with the board of some runs (see `packed`). */
export function mount(root, runs) {
  const state = {};
  const panel = el("main", { role: "tabpanel", id: "panel", tabindex: -1 });
  const tabs = VIEWS.map(([key, title]) =>
    el("button", { role: "tab", id: `tab-${key}`, "aria-controls": "panel", onclick: () => show(key) }, title, badge(key, runs)),
  );
  const show = (key) => {
    VIEWS.forEach(([name], i) => {
      tabs[i].setAttribute("aria-selected", String(name === key));
      tabs[i].tabIndex = name === key ? 0 : -1;
    });
    panel.setAttribute("aria-labelledby", `tab-${key}`);
    panel.replaceChildren(VIEWS.find(([name]) => name === key)[2](runs, state, open));
    root.dataset.view = key;
  };
  const open = async (view, quantity, names, run) => {
    if (quantity) {
      const table = await run.table(quantity);
      const chosen = new Set(names.map((name) => table.layers.indexOf(name)).filter((index) => index >= 0));
      Object.assign(state, { quantity, run: runs.indexOf(run), scale: null, chosen });
    }
    show(view);
    tabs[VIEWS.findIndex(([name]) => name === view)].focus();
  };
  const list = el("div", { role: "tablist", "aria-label": "views" }, tabs);
  list.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const next = (tabs.indexOf(document.activeElement) + by + tabs.length) % tabs.length;
    show(VIEWS[next][0]);
    tabs[next].focus();
    event.preventDefault();
  });
  const name = runs.map((run) => run.label).join(" and ");
  root.replaceChildren(
    el("header", {}, el("h1", {}, "dynamon ", el("span", { class: "run" }, name)), list, themeSwitch()),
    panel,
  );
  show("stability");
}

function badge(key, runs) {
  const count = runs.flatMap((run) => run.findings).filter((finding) => finding.severity !== "note").length;
  return key === "health" && count ? el("span", { class: "badge" }, String(count)) : null;
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
