// The view of layers: any per-layer quantity as a map, and the curves of the layers that were clicked.

import { lineChart } from "./chart.js";
import { MAPS } from "./colors.js";
import { choice, el } from "./dom.js";
import { groupsOf, heatmap } from "./heatmap.js";
import { counted, kindOf, median } from "./numbers.js";
import { ADD, empty, remembered } from "./views.js";

const FIRST = ["gradient/dual", "gradient/l2", "noise/dual", "update/ratio"]; // what the view opens with
const MOST = 5; // curves at a time

/** 2: the map of one run; curves of all runs. */
export async function layers(runs, state, actions) {
  const which = Math.min(state.run ?? 0, runs.length - 1);
  const run = runs[which];
  const chooseRun =
    runs.length > 1
      ? choice("run ", runs.map((one, i) => [String(i), one.label]), String(which), (v) => actions.change({ run: Number(v) }))
      : null;
  if (!run.quantities.length) {
    return el("div", {}, chooseRun, empty(
      "No readings by layer in this run",
      `${ADD}, or GradientMonitor(), WeightMonitor().`,
      "CSVLogger keeps single layers while they make at most 400 columns; TensorBoardLogger keeps all of them.",
    ));
  }
  const quantity = run.quantities.includes(state.quantity)
    ? state.quantity
    : (FIRST.find((name) => run.quantities.includes(name)) ?? run.quantities[0]);
  const isLog = (state.scale ?? run.shown.get(quantity)?.scale ?? "log") === "log";
  const tables = await Promise.all(runs.map((one) => (one.quantities.includes(quantity) ? one.table(quantity) : null)));
  const table = tables[which];
  if (state.folded === "all") {
    state.folded = new Set(groupsOf(table.layers).filter((group) => group.members.length > 1).map((group) => group.key));
  }
  const titles = run.quantities.map((name) => {
    const words = run.shown.get(name)?.words;
    return [name, words ? `${name}: ${words}` : name];
  });
  const controls = el(
    "div",
    { class: "controls" },
    chooseRun,
    choice("quantity ", titles, quantity, (v) => actions.change({ quantity: v, scale: null })),
    choice("colours ", [["log", "logarithmic"], ["linear", "linear"]], isLog ? "log" : "linear", (v) => actions.change({ scale: v })),
    choice("map ", MAPS.map((name) => [name, name]), state.map, (v) => actions.change({ map: v })),
    choice("rows ", [["auto", "as they fit"], ["readable", "with names"], ["compact", "compact"]], state.density, (v) => actions.change({ density: v })),
    el("button", { onclick: () => actions.change({ folded: "all" }) }, "fold all"),
    el("button", { onclick: () => actions.change({ folded: new Set() }) }, "unfold all"),
  );
  const curves = el("div", { class: "curves" });
  const show = () => curves.replaceChildren(curvesOf(runs, tables, which, quantity, isLog, state));
  const pick = (name) => {
    if (!state.chosen.delete(name)) {
      if (state.chosen.size >= MOST) state.chosen.delete([...state.chosen][0]);
      state.chosen.add(name);
    }
    show();
    map.querySelectorAll("button.layer").forEach((node) => node.setAttribute("aria-pressed", String(state.chosen.has(node.title))));
  };
  const density = state.density === "auto" ? (table.layers.length > 40 ? "compact" : "readable") : state.density;
  const { folded, chosen, map: colors, cell, axis } = state;
  const map = heatmap({ table, axis, isLog, map: colors, density, folded, chosen, pick, memory: cell });
  show();
  const shown = table.total > table.steps.length ? `Every ${Math.ceil(table.total / table.steps.length)}th of ${table.total} readings. ` : "";
  const note = `${shown}${counted(table.layers.length, kindOf(run, quantity))}, ${table.steps.length} readings. Click a row for its curve.`;
  return el("div", {}, controls, el("p", { class: "hint" }, note), map, curves);
}

/** The chosen layers in every run, the run of the map in full lines, and the median of its layers. */
function curvesOf(runs, tables, which, quantity, isLog, state) {
  const own = tables[which];
  const lines = tables.flatMap((table, i) => {
    if (!table) return [];
    return [...state.chosen].flatMap((name, color) => {
      const index = table.layers.indexOf(name);
      if (index < 0) return [];
      const label = runs.length > 1 ? `${name} (${runs[i].label})` : name;
      const values = Float64Array.from(table.steps, (_, t) => table.values[t * table.layers.length + index]);
      const style = state.chosen.size === 1 && runs.length > 2 ? { color: i + 1 } : { color: color + 1, dash: i !== which };
      return [{ label, steps: table.steps, values, ...style }];
    });
  });
  const count = own.layers.length;
  const middle = Float64Array.from(own.steps, (_, t) => median([...own.values.subarray(t * count, (t + 1) * count)]));
  lines.push({ label: `median of all ${kindOf(runs[which], quantity)}s`, steps: own.steps, values: middle, color: 6, dash: "dots" });
  const note = lines.length > 1 ? null : "Click a row of the map to see it here.";
  return lineChart({ ...remembered(state, quantity), title: quantity, note, lines, isLog });
}
