// The four views. Each takes the runs and returns an element; `runs[i].scalar(tag)` and `await runs[i].table(quantity)`.

import { lineChart } from "./chart.js";
import { MAPS } from "./colors.js";
import { choice, el } from "./dom.js";
import { groupsOf, heatmap } from "./heatmap.js";
import { median } from "./numbers.js";

const FIRST = ["gradient/dual", "gradient/l2", "noise/dual", "update/ratio"]; // what Layers opens with
const LINEAR = ["lr/ratio", "weight/memory", "update/layer_cosine", "spectrum/deviation"];
const ADD = "Add DynamicsMonitor() from dynamon.callbacks to the Trainer's callbacks";

/** The axis of steps that all views share. */
export function stepsOf(runs) {
  return [0, Math.max(1, ...runs.map((run) => run.lastStep))];
}

/** Lines of tags in every run; a second run is dashed. `specs`: [tag, label, more properties]. */
function linesOf(runs, specs) {
  return runs.flatMap((run, which) =>
    specs.flatMap(([tag, label, more = {}], i) => {
      const series = tag ? run.scalar(tag) : null;
      if (!series) return [];
      const name = runs.length > 1 ? `${label} (${run.label})` : label;
      const kind = which > 0 && more.kind === "points" ? "rings" : more.kind;
      return [{ label: name, ...series, color: i + 1, dash: which > 0, ...more, kind }];
    }),
  );
}

function bandsOf(runs, quantity) {
  return runs.flatMap((run, which) => {
    const [low, middle, high] = ["p10", "median", "p90"].map((name) => run.scalar(`${quantity}_${name}`));
    if (!low || !middle || !high || low.steps.length !== high.steps.length) return [];
    const of = runs.length > 1 ? ` (${run.label})` : "";
    const color = which + 1;
    return [
      { label: `10 to 90 % of layers${of}`, steps: low.steps, values: low.values, upper: high.values, kind: "band", color },
      { label: `median layer${of}`, ...middle, color, dash: which > 0 },
    ];
  });
}

function charts(runs, specs) {
  const steps = stepsOf(runs);
  return specs.filter((spec) => spec.lines.length).map((spec) => lineChart({ steps, ...spec }));
}

function empty(title, ...lines) {
  return el("div", { class: "empty" }, el("h2", {}, title), lines.map((line) => el("p", {}, line)));
}

/** 1: how far the step is from what the curvature allows, and the loss above the same steps. */
export function stability(runs) {
  const solved = (tag, label) => [
    [`sharpness/${tag}`, label],
    [`sharpness/${tag}_upper`, "99 % upper bound", { kind: "points" }],
    [`sharpness/${tag}_unconverged`, "did not converge: a lower bound", { kind: "hollow" }],
    [`sharpness/${tag}_bracket`, "on other samples", { kind: "points" }],
  ];
  const threshold = ["sharpness/threshold", "where plain gradient descent becomes unstable", { dash: true, color: 5 }];
  const found = charts(runs, [
    {
      title: "Stability ratio",
      note: "1 is the largest stable step. Around 1 is normal training; far above 1 with a rising loss is not.",
      lines: linesOf(runs, solved("stability_ratio", "stability ratio")),
      rules: [{ value: 1, label: "largest stable step" }],
    },
    { title: "Top eigenvalue of the Hessian", lines: linesOf(runs, [...solved("hessian_max", "eigenvalue"), threshold]) },
    {
      title: "Sharpness along the step",
      lines: linesOf(runs, [
        ["sharpness/directional", "along the last update"],
        ["sharpness/critical", "critical"],
        ["sharpness/batch", "of the batch"],
      ]),
      isLog: true,
    },
    {
      title: "How far the last step could have gone",
      note: "In multiples of the step taken; the loss rises below 1 (critical) or 1/2 (best).",
      lines: linesOf(runs, [
        ["sharpness/critical_multiple", "until the loss is back where it was"],
        ["sharpness/greedy_multiple", "to the lowest loss"],
      ]),
      rules: [{ value: 1, label: "the step taken" }],
    },
  ]);
  const loss = runs.flatMap((run, which) => linesOf([run], [[run.loss, runs.length > 1 ? `${run.loss} (${run.label})` : run.loss]]).map(
    (line) => ({ ...line, color: which + 1, dash: which > 0 }),
  ));
  const isLog = loss.length > 0 && loss.every((line) => line.values.every((value) => !(value <= 0)));
  const learning = charts(runs, [{ title: "Training loss", lines: loss, isLog }]);
  const hint = "A run of some hundred short steps may end without a reading at a budget of 2 %; give it a larger one.";
  return el(
    "div",
    {},
    found.length ? null : empty("No reading of the curvature in this run", `${ADD}, or SharpnessMonitor().`, hint),
    found.slice(0, 1),
    learning,
    found.slice(1),
  );
}

/** 2: any per-layer quantity as a map, and the curves of the layers that were clicked. */
export function layers(runs, state) {
  const run = runs[Math.min(state.run ?? 0, runs.length - 1)];
  if (!run.quantities.length) {
    return empty(
      "No readings by layer in this run",
      `${ADD}, or GradientMonitor(), WeightMonitor().`,
      "CSVLogger keeps single layers while they make at most 400 columns; TensorBoardLogger keeps all of them.",
    );
  }
  const quantity = run.quantities.includes(state.quantity)
    ? state.quantity
    : (FIRST.find((name) => run.quantities.includes(name)) ?? run.quantities[0]);
  const root = el("div");
  const body = el("div", {}, "reading …");
  const isLog = (state.scale ?? (LINEAR.includes(quantity) ? "linear" : "log")) === "log";
  const again = (change) => {
    Object.assign(state, change);
    root.replaceWith(layers(runs, state));
  };
  root.append(
    el(
      "div",
      { class: "controls" },
      runs.length > 1 ? choice("run ", runs.map((one, i) => [String(i), one.label]), String(state.run ?? 0), (v) => again({ run: Number(v), folded: null, chosen: null })) : null,
      choice("quantity ", run.quantities.map((name) => [name, name]), quantity, (v) => again({ quantity: v, scale: null })),
      choice("colours ", [["log", "logarithmic"], ["linear", "linear"]], isLog ? "log" : "linear", (v) => again({ scale: v })),
      choice("map ", MAPS.map((name) => [name, name]), state.map ?? "viridis", (v) => again({ map: v })),
      choice("rows ", [["auto", "as they fit"], ["readable", "with names"], ["compact", "compact"]], state.density ?? "auto", (v) => again({ density: v })),
      el("button", { onclick: () => again({ folded: "all" }) }, "fold all"),
      el("button", { onclick: () => again({ folded: null }) }, "unfold all"),
    ),
    body,
  );
  run.table(quantity).then((table) => body.replaceChildren(layerMap(runs, table, quantity, isLog, state)));
  return root;
}

function layerMap(runs, table, quantity, isLog, state) {
  const curves = el("div", { class: "curves" });
  const steps = stepsOf(runs);
  state.chosen = new Set([...(state.chosen ?? [])].filter((index) => index < table.layers.length));
  if (state.folded === "all") state.folded = new Set(groupKeys(table.layers));
  state.folded ??= new Set();
  const show = () => curves.replaceChildren(curvesOf(table, quantity, isLog, state.chosen, steps));
  const density = (state.density ?? "auto") === "auto" ? (table.layers.length > 40 ? "compact" : "readable") : state.density;
  const pick = (index) => {
    if (!state.chosen.delete(index)) {
      if (state.chosen.size >= 5) state.chosen.delete([...state.chosen][0]);
      state.chosen.add(index);
    }
    show();
    map.querySelectorAll("button.layer").forEach((node) => {
      const chosen = [...state.chosen].some((one) => table.layers[one] === node.title);
      node.setAttribute("aria-pressed", String(chosen));
    });
  };
  const map = heatmap({ table, steps, isLog, map: state.map ?? "viridis", density, folded: state.folded, chosen: state.chosen, pick });
  show();
  const shown = table.total > table.steps.length ? `Every ${Math.ceil(table.total / table.steps.length)}th of ${table.total} readings. ` : "";
  const note = `${shown}${table.layers.length} layers, ${table.steps.length} readings. Click a row for its curve.`;
  return el("div", {}, el("p", { class: "hint" }, note), map, curves);
}

function groupKeys(names) {
  return groupsOf(names).filter((group) => group.members.length > 1).map((group) => group.key);
}

function curvesOf(table, quantity, isLog, chosen, steps) {
  const count = table.layers.length;
  const column = (index) => Float64Array.from(table.steps, (_, t) => table.values[t * count + index]);
  const middle = Float64Array.from(table.steps, (_, t) => median([...table.values.subarray(t * count, (t + 1) * count)]));
  const lines = [...chosen].map((index, i) => ({ label: table.layers[index], steps: table.steps, values: column(index), color: i + 1 }));
  lines.push({ label: "median of all layers", steps: table.steps, values: middle, color: 6, dash: true });
  return lineChart({ title: quantity, note: chosen.size ? null : "Click a row of the map to see a layer here.", lines, steps, isLog });
}

/** 3: the base rate, what steering makes of it, and the noise that it follows. */
export function rates(runs) {
  const found = charts(runs, [
    { title: "Base learning rate", lines: linesOf(runs, [["lr/base", "base rate"]]) },
    { title: "Rate ratio across layers", lines: bandsOf(runs, "lr/ratio") },
    { title: "Layers at a bound of the rule", lines: linesOf(runs, [["lr/bounded", "layers"]]) },
  ]);
  const noise = charts(runs, [
    { title: "Gradient noise across layers, dual norm", lines: bandsOf(runs, "noise/dual"), isLog: true },
    { title: "Signal to noise across layers", lines: bandsOf(runs, "noise/snr"), isLog: true },
    {
      title: "Gradient noise scale",
      note: "The batch at which noise equals signal, in multiples of yours.",
      lines: linesOf(runs, [["noise/scale", "noise scale"]]),
      isLog: true,
    },
  ]);
  const add = "Add NoiseAdaptiveLR() or LayerwiseLR(...) from dynamon.callbacks; apply=False shows the rates and changes nothing.";
  return el("div", {}, found.length ? found : empty("No steering of rates in this run", add), noise);
}

/** 4: what looks wrong, the worst first. */
export function health(runs, state, open) {
  return el(
    "div",
    {},
    runs.map((run) => [
      runs.length > 1 ? el("h2", {}, run.label) : null,
      run.findings.length
        ? el("ol", { class: "findings" }, run.findings.map((finding) => card(run, finding, open)))
        : empty("Nothing looks wrong", "No rule has anything to say. Sharpness around its threshold is normal training."),
    ]),
  );
}

function card(run, finding, open) {
  const names = finding.layers;
  const quantity = finding.tags.find((tag) => run.quantities.includes(tag));
  const view = quantity ? "layers" : finding.tags.some((tag) => tag.startsWith("lr/")) ? "rates" : "stability";
  const chosen = quantity ? names.slice(0, 5) : [];
  return el(
    "li",
    { class: `finding ${["fault", "warning", "note"].find((one) => one === finding.severity) ?? "note"}` },
    el("h3", {}, el("span", { class: "severity" }, finding.severity), ` from step ${finding.step}`),
    el("p", {}, finding.message),
    el("p", { class: "advice" }, finding.advice),
    names.length > 1 ? el("details", {}, el("summary", {}, `${names.length} layers`), el("ul", {}, names.map((name) => el("li", {}, name)))) : null,
    finding.tags.length ? el("button", { onclick: () => open(view, quantity, chosen, run) }, `show ${quantity ?? view}`) : null,
  );
}
