// A map of layers over steps: rows in model order, groups that fold, the value under the pointer.

import { steer } from "./axis.js";
import { BELOW, FAINTEST, INFINITE, NEGATIVE, POSITIVE, UNSURE, colorScale, colorTable, signedScale } from "./colors.js";
import { el, onWidth } from "./dom.js";
import { exact, median, nearest, range, short, stepText, stepTicks } from "./numbers.js";

const LABELS = 260; // pixels
const ROW = { compact: 4, readable: 17 };
const HEADER = 17;

/** Groups of neighbouring layers that share their name up to its first number, or their first part. */
export function groupsOf(names) {
  const cut = sharedPrefix(names);
  const groups = [];
  names.forEach((name, index) => {
    const rest = name.slice(cut);
    const numbered = rest.match(/^(?:[^.]*\.)*?\d+(?=\.|$)/);
    const key = numbered ? numbered[0] : rest.split(".")[0];
    const last = groups[groups.length - 1];
    if (last && last.key === key) last.members.push({ index, label: rest });
    else groups.push({ key, members: [{ index, label: rest }] });
  });
  for (const group of groups) {
    if (group.members.length > 1) {
      for (const member of group.members) member.label = member.label.slice(group.key.length).replace(/^\./, "") || group.key;
    }
  }
  return groups;
}

function sharedPrefix(names) {
  if (names.length < 2) return 0;
  let cut = 0;
  for (let end = names[0].indexOf("."); end >= 0; end = names[0].indexOf(".", end + 1)) {
    if (!names.every((name) => name.startsWith(names[0].slice(0, end + 1)))) break;
    if (/\d/.test(names[0][end + 1])) break; // blocks.0 says more than 0
    cut = end + 1;
  }
  return cut;
}

/** options: table {steps, layers, values}, axis (the Axis of all charts), isLog, map, density, folded (Set of groups),
 * chosen (Set of layer names), pick(name), memory (keeps the cell and the place scrolled to), isSigned (two colours by
 * sign in place of map). A table with `errors` shows them, and values within two of them of zero are grey. Returns the
 * element. */
export function heatmap(options) {
  const { table, axis } = options;
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": "layers over steps; arrow keys move, Enter shows a layer's curve" });
  const labels = el("div", { class: "rowlabels" });
  const box = el("div", { class: "cell", hidden: true });
  const tip = el("div", { class: "tip", hidden: true, role: "status", "aria-live": "polite" });
  const line = el("div", { class: "mapcursor" });
  const spikes = el("div", { class: "mapspikes" });
  const area = el("div", { class: "maparea" }, canvas, spikes, line, box, tip);
  const root = el("div", { class: "map" }, labels, area);
  const scale = el("div", { class: "mapaxis" });
  const found = range(table.values, (v) => Number.isFinite(v) && (!options.isLog || v > 0)) ?? [0, 1];
  const most = Math.max(...found.map(Math.abs)) || 1;
  const limits = options.isSigned ? [-most, most] : found;
  const color = options.isSigned ? signedScale(most) : colorScale(options.map, limits[0], limits[1], options.isLog);
  const groups = groupsOf(table.layers);
  const memory = options.memory ?? {};
  let layout = null;
  let width = 0;
  let cursor = memory.cell ?? null; // [row, column of the table]

  const redraw = () => {
    layout = rowsOf(groups, options, table);
    paintLabels();
    repaint();
  };
  const place = (step) => (width * (step - axis.shown[0])) / (axis.shown[1] - axis.shown[0] || 1);
  const repaint = () => {
    paint(canvas, layout, table, axis.shown, width, color);
    const within = axis.marks.filter((mark) => mark.step >= axis.shown[0] && mark.step <= axis.shown[1]);
    spikes.replaceChildren(
      ...within.map(({ step, text }) => {
        const mark = el("div", { title: `step ${step}, ${text}` });
        mark.style.left = `${place(step)}px`;
        return mark;
      }),
    );
    scale.replaceChildren(
      ...stepTicks(...axis.shown, width / 110).map((step) => {
        const mark = el("span", {}, String(step));
        mark.style.left = `${LABELS + Math.min(place(step), width - 6 * mark.textContent.length)}px`; // inside at the end
        return mark;
      }),
    );
    move();
  };
  const move = () => {
    const [first, last] = axis.shown;
    line.hidden = axis.step === null || axis.step < first || axis.step > last;
    line.style.left = `${place(axis.cursor)}px`;
  };
  axis.join({ node: root, move, zoom: () => layout && (hide(), repaint()) });
  steer(area, axis, () => ({ left: canvas.getBoundingClientRect().left, width }));
  const paintLabels = () => {
    const parts = layout.labels.map(({ y, height, text, group, index, inset }) => {
      const isFolded = group !== undefined && options.folded.has(group);
      const node = el(
        "button",
        {
          class: group !== undefined ? "group" : "layer",
          title: group !== undefined ? `${isFolded ? "unfold" : "fold"} ${text}` : table.layers[index],
          "aria-expanded": group !== undefined ? String(!isFolded) : null,
          "aria-pressed": group === undefined ? String(options.chosen.has(table.layers[index])) : null,
          onclick: () => (group !== undefined ? toggle(group) : options.pick(table.layers[index])),
        },
        group !== undefined ? `${isFolded ? "▸" : "▾"} ${text}` : text,
      );
      node.style.top = `${y}px`;
      node.style.height = `${height}px`;
      node.style.paddingLeft = `${inset ? 22 : 4}px`;
      return node;
    });
    labels.replaceChildren(...parts);
    labels.style.height = `${layout.height}px`;
  };
  const toggle = (group) => {
    if (!options.folded.delete(group)) options.folded.add(group);
    cursor = null;
    hide();
    redraw();
    const again = [...labels.querySelectorAll(".group")].find((node) => node.textContent.slice(2) === group);
    if (again) again.focus();
  };
  const hide = () => {
    box.hidden = tip.hidden = true;
    memory.cell = null;
  };
  const point = (row, column) => {
    memory.cell = cursor = [row, column];
    const { y, height, name, read } = layout.rows[row];
    const step = table.steps[column];
    const x = place(step);
    box.hidden = tip.hidden = false;
    Object.assign(box.style, { left: `${x - 1}px`, top: `${y}px`, height: `${height}px` });
    const error = layout.rows[row].error(column);
    const about = Number.isNaN(error) ? "" : ` ± ${short(2 * error)}`;
    tip.replaceChildren(el("b", {}, `${exact(read(column))}${about}`), ` at step ${stepText(step)}`, el("br"), name);
    const isRight = x > width / 2;
    Object.assign(tip.style, {
      top: `${Math.max(0, y - 8)}px`,
      left: isRight ? "auto" : `${x + 14}px`,
      right: isRight ? `${width - x + 14}px` : "auto",
    });
  };
  canvas.addEventListener("pointermove", (event) => {
    const [row, column] = under(event);
    if (row >= 0 && !event.buttons) point(row, column);
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("click", (event) => choose(cursor && !tip.hidden ? cursor[0] : under(event)[0]));
  canvas.addEventListener("keydown", (event) => {
    const [dy, dx] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    const [row, column] = cursor ?? [0, table.steps.length - 1];
    if (event.key === "Enter" || event.key === " ") choose(row);
    else if (dy || dx) {
      const stride = event.shiftKey ? 10 : 1;
      const to = (value, most) => Math.max(0, Math.min(most - 1, value));
      const other = to(column + dx * stride, table.steps.length);
      axis.moveTo(table.steps[other]);
      point(to(row + dy * stride, layout.rows.length), other);
    } else if (event.ctrlKey || event.metaKey || event.altKey || !axis.key(event.key)) return;
    event.preventDefault();
  });
  const choose = (row) => {
    const index = layout.rows[row]?.index;
    if (index !== undefined) options.pick(table.layers[index]);
    else if (layout.rows[row]) toggle(layout.rows[row].group);
  };
  const under = (event) => {
    const edges = canvas.getBoundingClientRect();
    const y = event.clientY - edges.top;
    const step = axis.shown[0] + ((event.clientX - edges.left) / edges.width) * (axis.shown[1] - axis.shown[0]);
    if (!layout) return [-1, 0]; // not on the screen yet
    return [layout.rows.findIndex((row) => y >= row.y && y < row.y + row.height), nearest(table.steps, step)];
  };
  onWidth(root, (whole) => {
    width = Math.max(whole - LABELS - 4, 50);
    redraw();
    scrolled.scrollTop = memory.scroll ?? 0;
    if (memory.cell && memory.cell[0] < layout.rows.length) point(...memory.cell);
  });
  const scrolled = el("div", { class: "mapscroll", onscroll: () => (memory.scroll = scrolled.scrollTop) }, root, scale);
  return el("div", {}, legend(options, limits), scrolled);
}

/** Where rows and labels lie. A folded group is one row, the median of its layers. */
function rowsOf(groups, options, table) {
  const [rows, labels] = [[], []];
  const layers = table.layers.length;
  const own = (index, column) => table.values[column * layers + index];
  const wrong = (index, column) => (table.errors ? table.errors[column * layers + index] : NaN);
  let y = 0;
  for (const { key, members } of groups) {
    const several = members.length > 1;
    if (several && options.folded.has(key)) {
      const read = (column) => median(members.map((member) => own(member.index, column)));
      labels.push({ y, height: HEADER, text: `${key} (median of ${members.length})`, group: key });
      rows.push({ y, height: HEADER, read, error: () => NaN, name: `${key}, median of ${members.length}`, group: key });
      y += HEADER;
      continue;
    }
    const readable = options.density === "readable";
    if (several) labels.push({ y, height: HEADER, text: key, group: key });
    if (several && readable) y += HEADER;
    const height = readable ? ROW.readable : Math.max(ROW.compact, HEADER / members.length);
    for (const { index, label } of members) {
      if (readable || !several) labels.push({ y, height, text: label, index, inset: several });
      rows.push({ y, height, index, name: table.layers[index], read: (column) => own(index, column), error: (column) => wrong(index, column) });
      y += height;
    }
  }
  return { rows, labels, height: y };
}

/** One line of colours a row, stretched to its height; a column of pixels shows the nearest reading, none outside of them. */
function paint(canvas, layout, table, steps, width, color) {
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dense);
  canvas.height = Math.max(1, Math.round(layout.height * dense));
  Object.assign(canvas.style, { width: `${width}px`, height: `${layout.height}px` });
  if (!table.steps.length || !layout.rows.length) return;
  const known = table.steps.length;
  const end = table.steps[known - 1] + (known > 1 ? (table.steps[known - 1] - table.steps[known - 2]) / 2 : 0.5);
  const columns = Int32Array.from({ length: width }, (_, x) => {
    const step = steps[0] + ((x + 0.5) / width) * (steps[1] - steps[0]);
    return step < table.steps[0] || step > end ? -1 : nearest(table.steps, step);
  });
  const image = new ImageData(width, layout.rows.length);
  layout.rows.forEach((row, r) => {
    for (let x = 0; x < width; ) {
      const column = columns[x];
      const shade = column < 0 ? null : color(row.read(column));
      const isSure = column < 0 || !(Math.abs(row.read(column)) <= 2 * row.error(column)); // or not known
      for (; x < width && columns[x] === column; x += 1) {
        if (shade) image.data.set(isSure ? [...shade, 255].slice(0, 4) : UNSURE, 4 * (r * width + x));
      }
    }
  });
  const flat = document.createElement("canvas");
  [flat.width, flat.height] = [width, layout.rows.length];
  flat.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  layout.rows.forEach((row, r) => {
    const top = Math.round(row.y * dense);
    const bottom = Math.round((row.y + row.height) * dense);
    context.drawImage(flat, 0, r, width, 1, 0, top, canvas.width, bottom - top);
  });
}

function legend(options, [low, high]) {
  const [weak, strong] = [FAINTEST / 255, 1];
  const stops = options.isSigned
    ? [[NEGATIVE, strong], [NEGATIVE, weak], [POSITIVE, weak], [POSITIVE, strong]].map(([rgb, a]) => `rgba(${rgb},${a})`)
    : colorTable(options.map).filter((_, i) => i % 15 === 0).map((rgb) => `rgb(${rgb})`);
  const bar = el("span", { class: "bar", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${stops.join(",")})`;
  const key = (rgb, text) => {
    const mark = el("span", { class: "patch", "aria-hidden": "true" });
    mark.style.background = `rgb(${rgb})`;
    return el("span", { class: "key" }, mark, text);
  };
  return el(
    "div",
    { class: "legend" },
    el("span", { class: "key" }, short(low), " ", bar, " ", short(high)),
    options.isLog ? key(BELOW, "zero or below") : null,
    options.table.errors ? key(UNSURE.slice(0, 3), "not sure: zero is within two standard errors") : key(INFINITE, "infinite"),
    el("span", { class: "key" }, "empty: no value"),
  );
}
