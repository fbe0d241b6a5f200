// The views made of curves, and health. A view takes the runs (see board.js), what the reader chose, and what he can do.

import { lineChart } from "./chart.js";
import { el } from "./dom.js";
import { counted, kindOf, median } from "./numbers.js";
import { spikeList } from "./spikes.js";

export const ADD = "Add DynamicsMonitor() from dynamon.callbacks to the Trainer's callbacks";

const FINE = "Nothing looks wrong";

/** The axis of steps that all views share. */
export function stepsOf(runs) {
  return [0, Math.max(1, ...runs.map((run) => run.lastStep))];
}

/**
 * Lines of tags in every run; a second run is dashed. Of more than two runs only the first line that any of them has is
 * drawn, in the colour of the run. `specs`: [tag, label, more properties].
 */
function linesOf(runs, specs) {
  if (runs.length > 2) {
    const main = specs.find(([tag, , more]) => !more?.kind && runs.some((run) => tag && run.scalar(tag)));
    const [tag, label] = main ?? [];
    return runs.flatMap((run, which) => {
      const series = tag ? run.scalar(tag) : null;
      return series ? [{ label: `${label} (${run.label})`, ...series, color: which + 1 }] : [];
    });
  }
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
    const band = { label: `10 to 90 % of layers${of}`, steps: low.steps, values: low.values, upper: high.values, kind: "band", color };
    const line = { label: `median layer${of}`, ...middle, color, dash: runs.length === 2 && which > 0 };
    return runs.length > 2 ? [line] : [band, line];
  });
}

function charts(state, specs) {
  const drawn = specs.filter((spec) => spec.lines.length);
  return drawn.map((spec) => lineChart({ ...remembered(state, spec.title), isLog: isFarApart(spec.lines), ...spec }));
}

/** Whether positive values are so far apart that a linear scale would show only the highest. */
function isFarApart(lines) {
  const values = lines.filter((line) => !line.kind).flatMap((line) => [...line.values].filter(Number.isFinite));
  const highest = values.reduce((one, other) => Math.max(one, other), 0);
  return values.every((value) => value > 0) && highest > 100 * median(values);
}

/** What all charts share: the axis of steps, how smooth, and what the reader chose in the chart of this title before. */
export function remembered(state, title) {
  return { axis: state.axis, smoothing: state.smoothing, memory: (state.charts[title] ??= {}) };
}

/** A box that says what is missing, and what to do. */
export function empty(title, ...lines) {
  return el("div", { class: "empty" }, el("h2", {}, title), lines.map((line) => el("p", {}, line)));
}

/** 1: how far the step is from what the curvature allows, and the loss above the same steps. */
export function stability(runs, state) {
  const solved = (tag, label) => [
    [`sharpness/${tag}`, label],
    [`sharpness/${tag}_upper`, "99 % upper bound", { kind: "points" }],
    [`sharpness/${tag}_unconverged`, "did not converge: a lower bound", { kind: "hollow" }],
    [`sharpness/${tag}_bracket`, "on other samples", { kind: "points" }],
  ];
  const threshold = ["sharpness/threshold", "where plain gradient descent becomes unstable", { dash: true, color: 5 }];
  const found = charts(state, [
    {
      title: "Stability ratio",
      note: "1 is the largest stable step. Around 1 is normal training; far above 1 with a rising loss is not.",
      lines: linesOf(runs, solved("stability_ratio", "stability ratio")),
      rules: [{ value: 1, label: "largest stable step" }],
    },
    { title: "Top eigenvalue of the Hessian", lines: linesOf(runs, [...solved("hessian_max", "eigenvalue"), threshold]) },
    {
      title: "Sharpness along the step",
      note: "Cheap readings of the curvature: along the last update; 2 over the rate at which the loss is back where it was "
        + "(critical); along the gradient of a batch.",
      lines: linesOf(runs, [
        ["sharpness/directional", "along the last update"],
        ["sharpness/critical", "critical"],
        ["sharpness/batch", "of the batch"],
      ]),
      isLog: true,
    },
    {
      title: "How far the last step could have gone",
      note: "In multiples of the step taken. Where the first line is below 1, the step raised the loss; where the second is "
        + "below 1, it went beyond the lowest.",
      lines: linesOf(runs, [
        ["sharpness/critical_multiple", "until the loss is back where it was"],
        ["sharpness/best_multiple", "to the lowest loss"],
      ]),
      rules: [{ value: 1, label: "the step taken" }],
    },
  ]);
  const loss = runs.flatMap((run, which) => linesOf([run], [[run.loss, runs.length > 1 ? `${run.loss} (${run.label})` : run.loss]]).map(
    (line) => ({ ...line, color: which + 1, dash: runs.length === 2 && which > 0 }),
  ));
  const isLog = loss.length > 0 && loss.every((line) => line.values.every((value) => !(value <= 0)));
  const learning = charts(state, [{ title: "Training loss", lines: loss, isLog }]);
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

/** 4: the base rate, what steering makes of it, and the noise that it follows. */
export function rates(runs, state) {
  const found = charts(state, [
    { title: "Base learning rate", lines: linesOf(runs, [["lr/base", "base rate"], ["lr/base_min", "smallest of all groups"]]) },
    { title: "Rate ratio across layers", lines: bandsOf(runs, "lr/ratio") },
    { title: "Effective rate across layers", lines: bandsOf(runs, "lr/effective"), isLog: true },
    { title: "Layers at a bound of the rule", lines: linesOf(runs, [["lr/bounded", "layers"]]) },
  ]);
  const noise = charts(state, [
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

/** 5: what looks wrong, the worst first, and what was checked. */
export function health(runs, state, actions) {
  return el(
    "div",
    {},
    spikeList(state.axis),
    runs.map((run) => [
      runs.length > 1 ? el("h2", {}, run.label) : null,
      !run.findings
        ? el("p", { class: "hint" }, "looking …")
        : run.findings.length
        ? el("ol", { class: "findings" }, run.findings.map((finding) => card(run, finding, actions.open)))
        : runs.length > 1
        ? el("p", { class: "result fine" }, FINE)
        : empty(FINE, "No rule has anything to say. Sharpness around its threshold is normal training."),
      run.findings && run.checks ? checked(run, runs.length > 1) : null,
    ]),
  );
}

/** What was checked, with the value seen; then what could not be checked, and which readings that needs. */
function checked(run, isShort) {
  const [seen, unseen] = [true, false].map((has) => run.checks.filter((check) => (check.value !== null) === has));
  const verdict = (check) => el("span", { class: `result ${check.severity ?? "fine"}` }, check.severity ?? "fine");
  const rows = seen.map((check) => el(
    "tr",
    {},
    el("th", { scope: "row" }, check.words),
    el("td", {}, verdict(check)),
    el("td", {}, check.value),
    el("td", { class: "hint" }, check.limit),
  ));
  const head = el("tr", {}, ["what was checked", "result", "seen", "reported from"].map((text) => el("th", { scope: "col" }, text)));
  const table = el("div", { class: "tablescroll" }, el("table", { class: "checks" }, el("thead", {}, head), el("tbody", {}, rows)));
  const missing = unseen.map((check) => el("li", {}, `${check.words}: needs ${check.needs}`));
  const rest = missing.length
    ? el("details", { class: "unchecked" }, el("summary", {}, `${missing.length} not checked, for want of readings`), el("ul", {}, missing))
    : null;
  const title = `${seen.length} things checked`;
  return isShort
    ? el("details", {}, el("summary", {}, title), table, rest)
    : el("section", {}, el("h2", {}, title), table, rest);
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
    names.length > 1 ? el("details", {}, el("summary", {}, counted(names.length, kindOf(run, quantity))), el("ul", {}, names.map((name) => el("li", {}, name)))) : null,
    finding.tags.length ? el("button", { onclick: () => open(view, quantity, chosen, run) }, `show ${quantity ?? view}`) : null,
  );
}
