// Numbers: arrays out of base64, short text, ticks of axes.

/** A little-endian array of float64 ("f8") or float32 ("f4") out of base64. */
export function decoded(text, kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return kind === "f4" ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
}

/** Four significant digits. */
export function short(value) {
  if (Number.isNaN(value)) return "no value";
  if (!Number.isFinite(value)) return value > 0 ? "infinite" : "-infinite";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

/** As many digits as single precision needs, in which event files hold values. */
export function exact(value) {
  if (!Number.isFinite(value)) return short(value);
  const single = Math.fround(value);
  if (!Number.isFinite(single) || (single === 0 && value !== 0)) return short(value);
  const digits = [1, 2, 3, 4, 5, 6, 7, 8, 9].find((count) => Math.fround(single.toPrecision(count)) === single);
  const size = Math.abs(single);
  return size !== 0 && (size < 1e-4 || size >= 1e9) ? single.toExponential(digits - 1) : String(Number(single.toPrecision(digits)));
}

/** Round numbers between two, about `count` of them. */
export function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) found.push(i * step);
  return found;
}

/** A step as text; the middle of several may lie between two. */
export function stepText(step) {
  return String(Math.round(step));
}

/** Steps between two, about `count` of them. */
export function stepTicks(first, last, count) {
  return ticks(first, last, Math.max(2, Math.min(count, last - first))).filter(Number.isInteger);
}

/** Powers of ten between two positive numbers, with 2 and 5 times those where there is room for them. */
export function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const inside = (value) => value >= low * 0.999 && value <= high * 1.001;
  const powers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const fine = powers.flatMap((power) => [1, 2, 5].map((factor) => Number(`${factor}e${power}`))).filter(inside);
  if (fine.length < 2) return ticks(low, high, count + 3).filter((value) => value > 0);
  if (fine.length <= count + 2) return fine;
  const stride = Math.ceil(powers.length / count);
  return powers.filter((power) => power % stride === 0).map((power) => Number(`1e${power}`)).filter(inside);
}

/** Index of the last of increasing steps that is not after `step`; 0 before the first. */
export function lastBefore(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return Math.max(low - 1, 0);
}

/** Index of the nearest of increasing steps. */
export function nearest(steps, step) {
  const before = lastBefore(steps, step);
  const after = Math.min(before + 1, steps.length - 1);
  return Math.abs(steps[after] - step) < Math.abs(step - steps[before]) ? after : before;
}

/** The range that holds all but half a per cent at each end of the values that pass; null where none does. */
export function range(values, passes) {
  const stride = Math.max(1, Math.floor(values.length / 50000));
  const kept = [];
  for (let i = 0; i < values.length; i += stride) if (passes(values[i])) kept.push(values[i]);
  if (!kept.length && stride > 1) for (const value of values) if (passes(value)) kept.push(value);
  if (!kept.length) return null;
  kept.sort((a, b) => a - b);
  const at = (share) => kept[Math.min(kept.length - 1, Math.max(0, Math.round(share * (kept.length - 1))))];
  return kept.length < 200 ? [kept[0], kept[kept.length - 1]] : [at(0.005), at(0.995)];
}

/** The median of the finite numbers among some; NaN where there is none. */
export function median(values) {
  const kept = values.filter(Number.isFinite).sort((a, b) => a - b);
  const half = kept.length >> 1;
  if (!kept.length) return NaN;
  return kept.length % 2 ? kept[half] : (kept[half - 1] + kept[half]) / 2;
}

/** A running mean that forgets: each value weighs `weight` times the one after it. NaN stays NaN and is passed over. */
export function smoothed(values, weight) {
  let [sum, total] = [0, 0];
  return Float64Array.from(values, (value) => {
    if (!Number.isFinite(value)) return value;
    sum = weight * sum + value;
    total = weight * total + 1;
    return sum / total;
  });
}

/** What the rows of a quantity are: layers, modules or heads. */
export const kindOf = (run, quantity) => run.shown.get(quantity)?.rows ?? "layer";

export const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
