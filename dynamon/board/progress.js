// The view of progress: what a step takes off the loss of the next batch, which layers do it, and which undo it.

import { lineChart } from "./chart.js";
import { choice, el } from "./dom.js";
import { heatmap } from "./heatmap.js";
import { short } from "./numbers.js";
import { ADD, empty, remembered } from "./views.js";

const HEADS = ["layer", "decrease in a step", "share", "in the last third", "overshoot", ""];

/** 3: the decrease of the loss in a step, by layer and over time; numbers and errors are made in `dynamon.board.progress`. */
export async function progress(runs, state, actions) {
  const which = Math.min(state.run ?? 0, runs.length - 1);
  const all = await Promise.all(runs.map((run) => run.progress()));
  const own = all[which];
  const chooseRun =
    runs.length > 1
      ? choice("run ", runs.map((one, i) => [String(i), one.label]), String(which), (v) => actions.change({ run: Number(v) }))
      : null;
  if (!own) {
    return el("div", {}, chooseRun, empty(
      "No reading of progress in this run",
      `${ADD}. It measures on each next batch what the step before did, as often as its budget allows.`,
      "Under manual optimisation it needs loss_fn=lambda module, batch: ...",
    ));
  }
  const chart = (title, note, lines, rules) => lineChart({ ...remembered(state, title), title, note, lines, rules });
  const lines = (make) => all.flatMap((found, i) => (found ? make(found, i, runs.length > 1 ? ` (${runs[i].label})` : "") : []));
  const decrease = lines(({ steps, total, low, high }, i, of) => [
    ...(runs.length > 2 ? [] : [{ label: `within two standard errors${of}`, steps, values: low, upper: high, kind: "band", color: i + 1 }]),
    { label: `mean decrease${of}`, steps, values: total, color: i + 1, dash: runs.length === 2 && i > 0 },
  ]);
  const overshoot = lines(({ steps, overshoot: values }, i, of) => [
    { label: `overshoot of the step${of}`, steps, values, color: i + 1, dash: runs.length === 2 && i > 0 },
  ]);
  const density = state.density === "auto" ? (own.layers.length > 40 ? "compact" : "readable") : state.density;
  const pick = (name) => actions.open("layers", "progress/decrease", [name], runs[which]);
  const map = heatmap({
    table: own, axis: state.axis, isLog: false, isSigned: true, density, folded: state.folded, chosen: new Set(), pick,
    memory: (state.mapOfProgress ??= {}),
  });
  return el(
    "div",
    {},
    chooseRun,
    el("p", { class: "verdict" }, own.sentence),
    chart("Decrease of the loss in a step", "On the next batch, which the step has not seen; without weight decay.", decrease, [
      { value: 0, label: "no progress" },
    ]),
    chart("Overshoot of the step", null, overshoot, [
      { value: 1, label: "lowest loss along the step" },
      { value: 2, label: "loss as before the step" },
    ]),
    el("h2", {}, "Who lowers the loss (blue), who raises it (orange)"),
    el("p", { class: "hint" }, "Means of successive readings. Click a row for all readings of a layer."),
    map,
    tableOf(own),
  );
}

/** A row for each layer, in the order of the model. */
function tableOf({ rows }) {
  const sized = (value, error) => [value === null ? "" : short(value), value === null || error === null ? "" : ` ± ${short(2 * error)}`];
  const cells = rows.map(([name, value, error, share, late, lateError, bent, verdict]) => [
    name, sized(value, error), share === null ? "" : `${(100 * share).toFixed(1)} %`, sized(late, lateError), bent === null ? "" : short(bent), verdict,
  ]);
  return el(
    "table",
    { class: "progress" },
    el("thead", {}, el("tr", {}, HEADS.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, cells.map(([name, ...rest]) =>
      el("tr", {}, el("th", { scope: "row" }, name), rest.map((text) => el("td", {}, text))),
    )),
  );
}
