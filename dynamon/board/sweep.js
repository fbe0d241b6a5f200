// The view of all runs: a table with one row for each, a picture of how they ended, and the choice of which are shown.

import { choice, el, onWidth, svg } from "./dom.js";
import { exact, logTicks, short, ticks } from "./numbers.js";

export const MOST_RUNS = 6; // shown at a time in the other views: one colour each
const COLUMNS = [
  ["name", "run"],
  ["steps", "steps"],
  ["rate", "highest rate"],
  ["final", "final loss"],
  ["lowest", "lowest loss"],
  ["ratio", "highest ratio"],
  ["health", "health"],
];
const SIDES = { ratio: "highest stability ratio", rate: "highest learning rate" };
const AREA = { left: 64, right: 20, top: 28, bottom: 44, height: 320 };

/** Runs: {name, steps, rate, final, lowest, ratio, loss, counts {fault, warning, note}, share}; null where unknown. */
export async function sweepView(runs, state, actions) {
  const rows = await actions.sweep.rows();
  state.rows = JSON.stringify(rows); // drawn again once they are others
  const shown = runs.map((run) => run.label);
  const read = rows.filter((row) => row.share === 1).length;
  const toggle = (name) => {
    const others = shown.filter((one) => one !== name);
    const chosen = others.length < shown.length ? others : [...shown, name].slice(-MOST_RUNS);
    if (chosen.length) actions.sweep.choose(chosen);
  };
  const order = state.order ?? { key: null, falls: false };
  const sorted = order.key ? [...rows].sort((a, b) => compared(a, b, order)) : rows;
  const side = state.side ?? "ratio";
  return el(
    "div",
    {},
    el("p", { class: "hint" }, `${rows.length} runs${read < rows.length ? `, ${read} of them read so far` : ""}. `
      + `Those ticked are in the other views, at most ${MOST_RUNS}. Losses are running medians; the ratio is the highest `
      + "converged reading of the stability ratio."),
    table(sorted, shown, order, toggle, actions),
    el("div", { class: "controls" }, choice("horizontal ", Object.entries(SIDES), side, (v) => actions.change({ side: v }))),
    picture(rows, shown, side, toggle),
  );
}

function worst(row) {
  return ["fault", "warning"].find((severity) => row.counts?.[severity]) ?? "fine";
}

function compared(one, other, { key, falls }) {
  const rank = (row) => (key === "health" ? (row.counts ? 1000 * row.counts.fault + row.counts.warning : null) : row[key]);
  const [a, b] = [rank(one), rank(other)];
  if (a === null || a === undefined || b === null || b === undefined) return (b ?? null) === null ? ((a ?? null) === null ? 0 : -1) : 1;
  const difference = key === "name" ? a.localeCompare(b, undefined, { numeric: true }) : numeric(a) - numeric(b);
  return falls ? -difference : difference;
}

/** Numbers that are not finite come as text. */
function numeric(value) {
  if (typeof value !== "string") return value ?? NaN;
  return { inf: Infinity, "-inf": -Infinity }[value] ?? NaN;
}

function table(rows, shown, order, toggle, actions) {
  const head = COLUMNS.map(([key, title]) => {
    const isOwn = order.key === key;
    const sort = () => actions.change({ order: { key, falls: isOwn && !order.falls } });
    return el(
      "th",
      { scope: "col", "aria-sort": isOwn ? (order.falls ? "descending" : "ascending") : "none" },
      el("button", { onclick: sort }, `${title}${isOwn ? (order.falls ? " ↓" : " ↑") : ""}`),
    );
  });
  const body = rows.map((row) => {
    const place = shown.indexOf(row.name);
    const chip = place >= 0 ? el("span", { class: `chip ink${place + 1}`, "aria-hidden": "true" }) : null;
    const box = el("input", { type: "checkbox", checked: place >= 0, "aria-label": `show ${row.name}`, onchange: () => toggle(row.name) });
    const cell = (key) => el("td", { class: "number" }, row[key] === null ? "–" : key === "steps" ? String(row[key]) : said(row[key]));
    return el(
      "tr",
      {},
      el("td", {}, box),
      el("th", { scope: "row", title: row.name }, chip, row.name),
      row.share === 1
        ? [...COLUMNS.slice(1, -1).map(([key]) => cell(key)), el("td", {}, verdictOf(row))]
        : el("td", { colspan: COLUMNS.length - 1, class: "hint" }, row.problem ?? "not read yet"),
    );
  });
  const titles = el("thead", {}, el("tr", {}, el("th", {}, "show"), head));
  return el("div", { class: "tablescroll" }, el("table", { class: "runtable" }, titles, el("tbody", {}, body)));
}

function said(value) {
  const number = numeric(value);
  return el("span", { title: exact(number) }, Number.isNaN(number) ? "not finite" : short(number));
}

function verdictOf(row) {
  const found = ["fault", "warning", "note"].filter((kind) => row.counts[kind]);
  const parts = found.map((kind) => `${row.counts[kind]} ${kind}${row.counts[kind] > 1 ? "s" : ""}`);
  return el("span", { class: `result ${worst(row)}` }, parts.join(", ") || "nothing looks wrong");
}

/** Final loss over the chosen side, one mark for each run: a circle, a triangle with a warning, a cross with a fault. */
function picture(rows, shown, side, toggle) {
  const known = rows.filter((row) => row.share === 1);
  const drawn = known.filter((row) => row[side] !== null && row.final !== null && Number.isFinite(numeric(row[side])));
  const missing = known.filter((row) => !drawn.includes(row)).map((row) => row.name);
  const holder = el("div", { class: "scatter" });
  const tip = el("div", { class: "tip", hidden: true, role: "status" });
  if (!drawn.length) return el("p", { class: "hint" }, `No run has both a training loss and a ${SIDES[side]}.`);
  const x = scaled(drawn.map((row) => numeric(row[side])));
  const y = scaled(drawn.map((row) => numeric(row.final)).filter(Number.isFinite));
  const notes = ["A click shows a run in the other views, or takes it out."];
  if (drawn.some((row) => !Number.isFinite(numeric(row.final)))) notes.push("Above the top line: the loss is not finite.");
  if (x.hasZero || y.hasZero) notes.push("At the edge: zero, on a logarithmic scale.");
  onWidth(holder, (width) => holder.replaceChildren(sketch(width), tip));
  const sketch = (width) => {
    const inner = { width: width - AREA.left - AREA.right, height: AREA.height - AREA.top - AREA.bottom };
    const across = (value) => AREA.left + inner.width * x.share(value);
    const up = (value) => (Number.isFinite(value) ? AREA.top + inner.height * (1 - y.share(value)) : AREA.top - 12);
    const node = svg("svg", { width, height: AREA.height, role: "group", "aria-label": `final loss over ${SIDES[side]}` });
    for (const value of y.ticks) {
      node.append(svg("line", { class: "grid", x1: AREA.left, x2: width - AREA.right, y1: up(value), y2: up(value) }));
      node.append(svg("text", { x: AREA.left - 8, y: up(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of x.ticks) {
      node.append(svg("text", { x: across(value), y: AREA.height - 24, "text-anchor": "middle" }, short(value)));
    }
    node.append(svg("text", { x: AREA.left + inner.width / 2, y: AREA.height - 6, "text-anchor": "middle" }, SIDES[side]));
    if (side === "ratio" && x.share(1) >= 0 && x.share(1) <= 1) {
      node.append(svg("line", { class: "rule", x1: across(1), x2: across(1), y1: AREA.top, y2: AREA.height - AREA.bottom }));
    }
    for (const row of drawn) node.append(point(row, across(numeric(row[side])), up(numeric(row.final))));
    return node;
  };
  const point = (row, left, top) => {
    const place = shown.indexOf(row.name);
    const words = `${row.name}: final loss ${wordOf(row.final)}, ${SIDES[side]} ${wordOf(row[side])}, ${verdictOf(row).textContent}`;
    const show = () => {
      tip.replaceChildren(words);
      tip.hidden = false;
      const isRight = left > holder.clientWidth / 2;
      const right = `${holder.clientWidth - left}px`;
      Object.assign(tip.style, { top: `${top + 12}px`, left: isRight ? "auto" : `${left}px`, right: isRight ? right : "auto" });
    };
    const hide = () => (tip.hidden = true);
    const act = () => toggle(row.name);
    const key = (event) => event.key === "Enter" && act();
    return svg(
      "g",
      { class: `run-mark ink${place >= 0 ? place + 1 : 6}`, tabindex: 0, role: "button", "aria-label": words, "aria-pressed": String(place >= 0),
        onpointerenter: show, onpointerleave: hide, onfocus: show, onblur: hide, onclick: act, onkeydown: key },
      svg("circle", { cx: left, cy: top, r: 12, fill: "transparent" }),
      mark(worst(row), left, top),
    );
  };
  return el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, el("h3", {}, `Final loss over the ${SIDES[side]}`), el("p", {}, notes.join(" "))),
    el("div", { class: "legend" }, [["fine", "nothing looks wrong"], ["warning", "a warning"], ["fault", "a fault"]].map(([kind, text]) => {
      const swatch = svg("svg", { width: 16, height: 16, "aria-hidden": "true", class: "inkrule" }, mark(kind, 8, 8));
      return el("span", { class: "key" }, swatch, ` ${text}`);
    })),
    holder,
    missing.length ? el("p", { class: "hint" }, `Not in the picture, for want of a value: ${missing.join(", ")}.`) : null,
  );
}

function wordOf(value) {
  const number = numeric(value);
  return Number.isFinite(number) ? exact(number) : "not finite";
}

function mark(kind, x, y) {
  if (kind === "fault") return svg("path", { class: "hollow strong", d: `M${x - 5} ${y - 5}l10 10m0 -10l-10 10` });
  if (kind === "warning") return svg("path", { class: "hollow strong", d: `M${x - 6} ${y + 5}h12l-6 -11z` });
  return svg("circle", { class: "dot", cx: x, cy: y, r: 5 });
}

/** Where values lie on an axis (0 to 1), logarithmic where they are far apart; then those not positive are at its end. */
function scaled(values) {
  const positive = values.filter((value) => value > 0);
  const isLog = values.every((value) => value >= 0) && positive.length > 1 && Math.max(...positive) > 10 * Math.min(...positive);
  const known = isLog ? positive : values;
  let [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
  if (isLog) [low, high] = [low / 1.3, high * 1.3];
  else {
    const pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    [low, high] = [low - pad, high + pad];
  }
  const shape = isLog ? Math.log : (value) => value;
  const share = (value) => (isLog && value <= 0 ? 0 : (shape(value) - shape(low)) / (shape(high) - shape(low)));
  return { share, hasZero: isLog && known.length < values.length, ticks: isLog ? logTicks(low, high, 7) : ticks(low, high, 5) };
}
