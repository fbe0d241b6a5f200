// Spikes, which the sentinel finds: every chart marks their steps, and health lists them.

import { el } from "./dom.js";
import { short } from "./numbers.js";

const SPIKE_KINDS = ["gradient", "update", "loss", "inputs"];

/** The spikes of some runs in the order of their steps: [{step, text}]. */
export function spikesOf(runs) {
  const found = runs.flatMap((run) => {
    const batches = run.scalar("spike/batch");
    const of = runs.length > 1 ? ` (${run.label})` : "";
    return [...(batches?.steps ?? [])].map((step, i) => ({ step, text: `${spikeText(run, step)}, batch ${batches.values[i]}${of}` }));
  });
  return found.sort((one, other) => one.step - other.step);
}

/** How far what was above its usual level. */
function spikeText(run, step) {
  const parts = SPIKE_KINDS.flatMap((kind) => {
    const series = run.scalar(`spike/${kind}`);
    const at = series ? series.steps.indexOf(step) : -1;
    return at < 0 ? [] : [`${kind} ${Number.isFinite(series.values[at]) ? short(series.values[at]) : "not finite"}`];
  });
  return `spike: ${parts.join(", ")} deviations`;
}

/** What to say of the spike at the cursor: one that is nearer than a hundredth of the steps shown; else nothing. */
export function spikeAt(axis) {
  const [from, to] = axis.shown;
  const near = axis.marks.filter((mark) => Math.abs(mark.step - axis.cursor) <= (to - from) / 100);
  if (!near.length || axis.step === null) return "";
  const [mark] = near.sort((one, other) => Math.abs(one.step - axis.cursor) - Math.abs(other.step - axis.cursor));
  return ` (step ${mark.step}, ${mark.text})`;
}

/** All spikes, with a button for each that puts the cursor there; null where there is none. */
export function spikeList(axis) {
  if (!axis.marks.length) return null;
  const item = ({ step, text }) => el("li", {}, el("button", { onclick: () => axis.moveTo(step) }, `step ${step}`), ` ${text}`);
  const title = `${axis.marks.length} spike${axis.marks.length > 1 ? "s" : ""}, marked in every chart`;
  return el("details", { class: "spikes" }, el("summary", {}, title), el("ol", {}, axis.marks.map(item)));
}
