// A line chart in SVG: lines, points, bands, horizontal rules; a cursor that the pointer or the arrow keys move.

import { el, onWidth, svg } from "./dom.js";
import { logTicks, nearest, short, smoothed, ticks } from "./numbers.js";

const MARKS = ["points", "rings", "hollow"];
const MARGIN = { left: 64, right: 16, top: 10, bottom: 28 };

/**
 * options: title, note, height, isLog, steps [first, last], rules [{value, label}], smoothing (0: none, below 1), memory
 * (an object that keeps the reader's choices for the next chart of this title),
 * lines [{label, steps, values, color (1 to 6), dash, kind ("line" | "points" | "rings" | "hollow" | "band"), upper}].
 */
export function lineChart(options) {
  const memory = options.memory ?? {};
  const lines = options.lines.filter((line) => line.steps.length).map((line) => withSmooth(line, options.smoothing));
  const holder = el("div", { class: "plot", tabindex: 0, role: "img", "aria-label": `${options.title}: ${described(lines)}` });
  const readings = lines.map(() => el("output"));
  const at = el("output");
  const legend = el(
    "div",
    { class: "legend" },
    el("span", { class: "key" }, "step ", at),
    lines.map((line, i) =>
      el("span", { class: "key" }, swatch(line), ` ${line.label} `, readings[i]),
    ),
    (options.rules ?? []).map((rule) => el("span", { class: "key" }, swatch({ color: "rule", dash: true }), ` ${rule.label}`)),
  );
  let view = null;
  const show = (step) => {
    at.textContent = String(step);
    lines.forEach((line, i) => {
      const index = nearest(line.steps, step);
      readings[i].textContent = line.upper
        ? `${short(line.values[index])} to ${short(line.upper[index])}`
        : short(line.values[index]);
      if (line.smooth) readings[i].append(` (${short(line.smooth[index])})`);
      const isOutside = step < line.steps[0] || step > line.steps[line.steps.length - 1];
      if (isOutside || (MARKS.includes(line.kind) && line.steps[index] !== step)) readings[i].append(` (step ${line.steps[index]})`);
    });
    if (view) view.move(step);
  };
  let current = Math.min(memory.step ?? Infinity, options.steps[1]);
  const axis = lines.length ? lines[0].steps : [];
  holder.addEventListener("pointermove", (event) => {
    if (view) show((memory.step = current = Math.round(view.stepAt(event.clientX - holder.getBoundingClientRect().left))));
  });
  holder.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (by && axis.length) {
      const index = Math.max(0, Math.min(axis.length - 1, nearest(axis, current) + by));
      show((memory.step = current = axis[index]));
      event.preventDefault();
    }
  });
  let width = 0;
  let isLog = memory.isLog ?? Boolean(options.isLog);
  const draw = () => {
    view = drawn(width, { ...options, isLog }, lines);
    holder.replaceChildren(view.node);
    show(current);
  };
  onWidth(holder, (wide) => {
    width = wide;
    draw();
  });
  const scale = el("button", { class: "scale", "aria-pressed": String(isLog), onclick: () => {
    memory.isLog = isLog = !isLog;
    scale.setAttribute("aria-pressed", String(isLog));
    draw();
  } }, "log scale");
  show(current); // the legend need not wait for the width
  const note = lines.some((line) => line.smooth) ? "Lines are smoothed; in brackets the smoothed value." : null;
  return el(
    "figure",
    { class: "chart" },
    scale,
    el("figcaption", {}, el("h3", {}, options.title), [options.note, note].filter(Boolean).map((text) => el("p", {}, text))),
    legend,
    holder,
  );
}

function withSmooth(line, weight) {
  const isLine = !MARKS.includes(line.kind) && line.kind !== "band";
  return weight && isLine && line.steps.length > 2 ? { ...line, smooth: smoothed(line.values, weight) } : line;
}

function described(lines) {
  return lines.map((line) => `${line.label}, ${line.steps.length} points`).join("; ");
}

function swatch(line) {
  const mark = svg("svg", { width: 22, height: 10, "aria-hidden": "true", class: `ink${line.color}` });
  if (MARKS.includes(line.kind)) mark.append(marker(11, 5, line.kind));
  else if (line.kind === "band") mark.append(svg("rect", { class: "band", x: 1, y: 1, width: 20, height: 8 }));
  else mark.append(svg("line", { class: "line", x1: 1, x2: 21, y1: 5, y2: 5, "stroke-dasharray": line.dash === "dots" ? "1.5 3" : line.dash ? "5 3" : null }));
  return mark;
}

function marker(x, y, kind) {
  if (kind === "hollow") return svg("path", { class: "hollow", d: `M${x - 4} ${y + 3}h8l-4 -7z` });
  return svg("circle", { class: kind === "rings" ? "hollow" : "dot", cx: x, cy: y, r: kind === "rings" ? 3.5 : 2.5 });
}

function extent(options, lines) {
  let low = Infinity;
  let high = -Infinity;
  const see = (value) => {
    if (Number.isFinite(value) && (!options.isLog || value > 0)) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  };
  for (const line of lines) {
    line.values.forEach(see);
    if (line.upper) line.upper.forEach(see);
  }
  for (const rule of options.rules ?? []) see(rule.value);
  if (low > high) return options.isLog ? [0.1, 1] : [0, 1];
  if (options.isLog) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
}

function drawn(width, options, lines) {
  const height = options.height ?? 220;
  const [first, last] = options.steps;
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const [low, high] = extent(options, lines);
  const shape = options.isLog ? Math.log : (value) => value;
  const x = (step) => MARGIN.left + (inner.width * (step - first)) / (last - first || 1);
  const y = (value) => MARGIN.top + inner.height * (1 - (shape(value) - shape(low)) / (shape(high) - shape(low)));
  const node = svg("svg", { width, height, "aria-hidden": "true" });
  node.append(...axes(options, inner, x, y, low, high, height, width));
  for (const line of lines) node.append(svg("g", { class: `ink${line.color}` }, shapes(line, x, y, options.isLog, inner.width)));
  for (const rule of options.rules ?? []) {
    const level = y(rule.value);
    node.append(svg("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: level, y2: level }));
  }
  const cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom });
  node.append(cursor);
  return {
    node,
    stepAt: (place) => Math.max(first, Math.min(last, first + ((place - MARGIN.left) / inner.width) * (last - first))),
    move: (step) => {
      cursor.setAttribute("x1", x(step));
      cursor.setAttribute("x2", x(step));
    },
  };
}

function axes(options, inner, x, y, low, high, height, width) {
  const parts = [];
  const levels = options.isLog ? logTicks(low, high, 5) : ticks(low, high, 5);
  for (const value of levels) {
    parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
    parts.push(svg("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of ticks(options.steps[0], options.steps[1], Math.max(2, inner.width / 110))) {
    parts.push(svg("text", { x: x(step), y: height - 8, "text-anchor": "middle" }, String(step)));
  }
  return parts;
}

function shapes(line, x, y, isLog, width) {
  const fits = (value) => Number.isFinite(value) && (!isLog || value > 0);
  if (MARKS.includes(line.kind)) {
    const marks = [];
    line.steps.forEach((step, i) => fits(line.values[i]) && marks.push(marker(x(step), y(line.values[i]), line.kind)));
    return marks;
  }
  if (line.kind === "band") {
    const kept = [...line.steps.keys()].filter((i) => fits(line.values[i]) && fits(line.upper[i]));
    const over = kept.map((i) => `${x(line.steps[i]).toFixed(1)} ${y(line.upper[i]).toFixed(1)}`);
    const under = kept.map((i) => `${x(line.steps[i]).toFixed(1)} ${y(line.values[i]).toFixed(1)}`).reverse();
    return kept.length ? [svg("path", { class: "band", d: `M${[...over, ...under].join("L")}Z` })] : [];
  }
  const dash = line.dash === "dots" ? "1.5 3" : line.dash ? "6 3" : null;
  const path = (values, kind) => svg("path", { class: kind, d: track({ ...line, values }, x, y, fits, width), "stroke-dasharray": dash });
  if (line.smooth) return [path(line.values, "line faint"), path(line.smooth, "line")];
  const few = line.steps.length <= 60;
  return [path(line.values, "line"), ...(few ? shapes({ ...line, kind: "points" }, x, y, isLog, width) : [])];
}

/** A path; of many points in a column of pixels only the lowest and the highest, in their order. */
function track(line, x, y, fits, width) {
  const { steps, values } = line;
  const thin = steps.length > 4 * width;
  let path = "";
  let isDown = false;
  const go = (i) => {
    path += `${isDown ? "L" : "M"}${x(steps[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
    isDown = true;
  };
  for (let i = 0; i < steps.length; ) {
    const column = Math.floor(x(steps[i]));
    let [low, high, next] = [-1, -1, i];
    for (; next < steps.length && (next === i || (thin && Math.floor(x(steps[next])) === column)); next += 1) {
      if (!fits(values[next])) continue;
      if (low < 0 || values[next] < values[low]) low = next;
      if (high < 0 || values[next] > values[high]) high = next;
    }
    if (low < 0) isDown = false;
    else {
      go(Math.min(low, high));
      if (low !== high) go(Math.max(low, high));
    }
    i = next;
  }
  return path;
}
