// A line chart, drawn by uPlot: lines, points, bands, horizontal rules. Its steps and its cursor are those of the axis.

import { steer, themeColor } from "./axis.js";
import { el, onWidth, svg } from "./dom.js";
import { exact, logTicks, nearest, short, smoothed, stepText, stepTicks, ticks } from "./numbers.js";
import { spikeAt } from "./spikes.js";
import { uPlot } from "./uplot.js";

const MARKS = ["points", "rings", "hollow"];
const LEFT = 64; // pixels of the axes and around the plot
const [RIGHT, TOP, BOTTOM] = [16, 10, 28];
const FONT = "12px system-ui, sans-serif";
const DOTS = [1.5, 3];
const DASH = [6, 3];

/**
 * options: title, note, height, isLog, axis (the Axis of all charts), rules [{value, label}], smoothing (0: none, below
 * 1), memory (an object that keeps the reader's choices for the next chart of this title),
 * lines [{label, steps, values, color (1 to 6), dash, kind ("line" | "points" | "rings" | "hollow" | "band"), upper,
 * total (readings, of which these points were kept)}].
 */
export function lineChart(options) {
  const { axis, memory = {} } = options;
  const lines = options.lines.filter((line) => line.steps.length).map((line) => withSmooth(line, options.smoothing));
  const holder = el("div", { class: "plot", tabindex: 0, role: "img", "aria-label": `${options.title}: ${described(lines)}` });
  const readings = lines.map(() => el("output"));
  const at = el("output");
  let plot = null;
  let width = 0;
  let isLog = memory.isLog ?? Boolean(options.isLog);
  const move = () => {
    at.textContent = `${stepText(axis.cursor)}${spikeAt(axis)}`;
    lines.forEach((line, i) => readings[i].replaceChildren(reading(line, axis)));
    if (plot) point(plot, axis.cursor);
  };
  const draw = () => {
    plot?.destroy();
    plot = drawn(holder, width, { ...options, isLog }, lines);
    move();
  };
  const zoom = () => plot?.setScale("x", { min: axis.shown[0], max: axis.shown[1] });
  axis.join({ node: holder, move, zoom, restyle: () => plot?.redraw(false), drop: () => plot?.destroy() });
  steer(holder, axis, () => ({ left: holder.getBoundingClientRect().left + LEFT, width: width - LEFT - RIGHT }));
  holder.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    const steps = lines[0]?.steps ?? [];
    if (by && steps.length) axis.moveTo(steps[Math.max(0, Math.min(steps.length - 1, nearest(steps, axis.cursor) + by))]);
    else if (event.ctrlKey || event.metaKey || event.altKey || !axis.key(event.key)) return;
    event.preventDefault();
  });
  onWidth(holder, (wide) => {
    width = wide;
    draw();
  });
  const scale = el("button", { class: "scale", "aria-pressed": String(isLog), onclick: () => {
    memory.isLog = isLog = !isLog;
    scale.setAttribute("aria-pressed", String(isLog));
    draw();
  } }, "log scale");
  move(); // the legend need not wait for the width
  const notes = [options.note, lines.some((line) => line.smooth) ? "Lines are smoothed; in brackets the smoothed value." : null, thinned(lines)];
  return el(
    "figure",
    { class: "chart" },
    scale,
    el("figcaption", {}, el("h3", {}, options.title), notes.filter(Boolean).map((text) => el("p", {}, text))),
    legendOf(lines, readings, at, options.rules ?? [], axis.marks.length),
    holder,
  );
}

function legendOf(lines, readings, at, rules, marks) {
  return el(
    "div",
    { class: "legend" },
    el("span", { class: "key" }, "step ", at),
    lines.map((line, i) => el("span", { class: "key" }, swatch(line), ` ${line.label} `, readings[i])),
    rules.map((rule) => el("span", { class: "key" }, swatch({ color: "rule", dash: "dots" }), ` ${rule.label}`)),
    marks ? el("span", { class: "key" }, swatch({ color: "mark", kind: "mark" }), " spike") : null,
  );
}

/**
 * What the legend says of a line: the value of its point nearest to the cursor, and the step of that where it is another.
 * While nobody points, that is the last point, and its step is of interest only where the line ends before the others.
 */
function reading(line, axis) {
  const step = axis.cursor;
  const index = nearest(line.steps, step);
  const value = line.upper ? `${short(line.values[index])} to ${short(line.upper[index])}` : exact(line.values[index]);
  const smooth = line.smooth ? ` (${short(line.smooth[index])})` : "";
  const away = Math.abs(line.steps[index] - step);
  const isPointed = axis.step !== null || MARKS.includes(line.kind);
  const last = line.steps.length - 1;
  const usual = isPointed ? 0 : (line.steps[last] - line.steps[0]) / Math.max(last, 1);
  return `${value}${smooth}${away <= usual ? "" : ` (step ${stepText(line.steps[index])})`}`;
}

function withSmooth(line, weight) {
  const isLine = !MARKS.includes(line.kind) && line.kind !== "band";
  return weight && isLine && line.steps.length > 2 ? { ...line, smooth: smoothed(line.values, weight) } : line;
}

function thinned(lines) {
  const line = lines.find((one) => one.total > one.steps.length);
  return line ? `Of ${line.total} points ${line.steps.length} are drawn: the lowest and the highest of each stretch.` : null;
}

function described(lines) {
  return lines.map((line) => `${line.label}, ${line.steps.length} points`).join("; ");
}

function swatch(line) {
  const mark = svg("svg", { width: 22, height: 10, "aria-hidden": "true", class: `ink${line.color}` });
  if (line.kind === "hollow") mark.append(svg("path", { class: "hollow", d: "M7 8h8l-4 -7z" }));
  else if (MARKS.includes(line.kind)) mark.append(svg("circle", { class: line.kind === "rings" ? "hollow" : "dot", cx: 11, cy: 5, r: 3 }));
  else if (line.kind === "mark") mark.append(svg("line", { class: "line", x1: 11, x2: 11, y1: 0, y2: 10 }));
  else if (line.kind === "band") mark.append(svg("rect", { class: "band", x: 1, y: 1, width: 20, height: 8 }));
  else mark.append(svg("line", { class: "line", x1: 1, x2: 21, y1: 5, y2: 5, "stroke-dasharray": dashOf(line)?.join(" ") }));
  return mark;
}

function dashOf(line) {
  return line.dash === "dots" ? DOTS : line.dash ? DASH : null;
}

function drawn(holder, width, options, lines) {
  const { axis, isLog, rules = [] } = options;
  const fits = (value) => Number.isFinite(value) && (!isLog || value > 0);
  const [tables, series, bands] = [[], [{}], []];
  const add = (line, values, style) => {
    tables.push([line.steps, Array.from(values, (value) => (fits(value) ? value : null))]);
    return series.push({ scale: "y", width: 1.5, ...style }) - 1;
  };
  for (const line of lines) addLine(line, add, bands);
  const muted = () => themeColor("--muted");
  const bare = { grid: { show: false }, ticks: { show: false }, stroke: muted, font: FONT, filter: (_, splits) => splits };
  const off = Object.fromEntries(["mousedown", "mouseup", "mousemove", "mouseenter", "mouseleave", "click", "dblclick"].map((kind) => [kind, () => null]));
  const height = options.height ?? 220;
  return new uPlot(
    {
      width,
      height,
      series,
      bands,
      legend: { show: false },
      padding: [TOP, RIGHT, 0, 0],
      scales: {
        x: { time: false, range: () => axis.shown },
        y: { distr: isLog ? 3 : 1, range: (u, low, high) => extent(u, low, high, rules, isLog) },
      },
      axes: [
        { ...bare, size: BOTTOM, splits: (u, _, low, high) => stepTicks(low, high, u.width / 110), values: (_, splits) => splits.map(String) },
        {
          ...bare,
          size: LEFT,
          grid: { stroke: () => themeColor("--line"), width: 1 },
          splits: (_, __, low, high) => (isLog ? logTicks(low, high, 5) : ticks(low, high, 5)),
          values: (_, splits) => splits.map(short),
        },
      ],
      cursor: { y: false, bind: off, drag: { x: false, y: false }, dataIdx: nearestPoint, points: { size: 7 } },
      hooks: { draw: [(u) => drawMarks(u, axis.marks), (u) => rules.forEach((rule) => drawRule(u, rule.value)), (u) => point(u, axis.cursor)] },
    },
    tables.length ? uPlot.join(tables, tables.map(() => [0, 1])) : [[...axis.shown]],
    holder,
  );
}

/** Put uPlot's cursor at a step. */
function point(plot, step) {
  plot.setCursor({ left: plot.valToPos(step, "x"), top: 0 }, false);
}

/** Add the series that a line is drawn by. `add(line, values, style)` returns the index of a series. */
function addLine(line, add, bands) {
  const color = () => themeColor(`--ink${line.color}`);
  const style = { stroke: color, dash: dashOf(line), points: { size: 5, fill: color, stroke: color } };
  if (line.kind === "band") {
    const under = add(line, line.values, { width: 0, points: { show: false } });
    const over = add(line, line.upper, { width: 0, points: { show: false } });
    bands.push({ series: [over, under], fill: () => `${color()}38` });
  } else if (MARKS.includes(line.kind)) {
    const points = { show: true, size: line.kind === "points" ? 5 : 8, stroke: color, width: 1.5 };
    const hollow = { ...points, fill: "transparent", ...(line.kind === "hollow" ? { paths: triangles } : {}) };
    add(line, line.values, { stroke: color, paths: () => null, points: line.kind === "points" ? { ...points, fill: color } : hollow });
  } else if (line.smooth) {
    add(line, line.values, { ...style, width: 1, alpha: 0.35 });
    add(line, line.smooth, { ...style, points: { show: false } });
  } else add(line, line.values, style);
}

/** Triangles in the place of uPlot's circles. */
function triangles(u, index, first, last) {
  const path = new Path2D();
  const size = 4 * uPlot.pxRatio;
  for (let i = first; i <= last; i += 1) {
    const value = u.data[index][i];
    if (value === null || value === undefined) continue;
    const [x, y] = [u.valToPos(u.data[0][i], "x", true), u.valToPos(value, "y", true)];
    path.moveTo(x - size, y + 0.75 * size);
    path.lineTo(x + size, y + 0.75 * size);
    path.lineTo(x, y - size);
    path.closePath();
  }
  return { stroke: path, fill: null, clip: null, flags: 3 };
}

/** The point of a series that is nearest to the cursor, of the joined steps of all series. */
function nearestPoint(u, index, closest) {
  const values = u.data[index];
  const has = (i) => values[i] !== null && values[i] !== undefined;
  for (let away = 0; away < values.length; away += 1) {
    if (closest - away >= 0 && has(closest - away)) return closest - away;
    if (closest + away < values.length && has(closest + away)) return closest + away;
  }
  return null;
}

/** The range of the vertical axis around the lowest and the highest value shown and the rules. */
function extent(u, lowest, highest, rules, isLog) {
  let [low, high] = [lowest ?? Infinity, highest ?? -Infinity];
  const see = (value) => [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (!(low <= high)) for (const values of u.data.slice(1)) for (const value of values) if (typeof value === "number") see(value);
  for (const rule of rules) if (!isLog || rule.value > 0) see(rule.value);
  if (!(low <= high)) return isLog ? [0.1, 1] : [0, 1];
  if (isLog) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
}

/** Thin vertical lines at steps. */
function drawMarks(u, marks) {
  const { ctx, bbox } = u;
  const { min, max } = u.scales.x;
  ctx.save();
  ctx.beginPath();
  ctx.strokeStyle = themeColor("--mark");
  ctx.lineWidth = Math.max(1, Math.round(uPlot.pxRatio));
  const half = (ctx.lineWidth % 2) / 2; // a line of one pixel lies on one column, not on halves of two
  for (const { step } of marks.filter((one) => one.step >= min && one.step <= max)) {
    const x = Math.round(u.valToPos(step, "x", true)) + half;
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
  }
  ctx.stroke();
  ctx.restore();
}

function drawRule(u, value) {
  const [{ ctx }, y] = [u, u.valToPos(value, "y", true)];
  ctx.save();
  ctx.beginPath();
  ctx.strokeStyle = themeColor("--text");
  ctx.lineWidth = 1.2 * uPlot.pxRatio;
  ctx.setLineDash([2, 3].map((length) => length * uPlot.pxRatio));
  ctx.moveTo(u.bbox.left, y);
  ctx.lineTo(u.bbox.left + u.bbox.width, y);
  ctx.stroke();
  ctx.restore();
}
