// The axis of steps that all charts of the board share: which steps are shown, which one the cursor is at, and the
// gestures that change both.

import { el } from "./dom.js";

const LEAST = 2; // steps that are always shown
const DRAG = 4; // pixels from which a press is a drag, and no click
const CLOSER = 0.6; // of what was shown, when zooming in once

export class Axis {
  /** changed: called after a reader zoomed or moved the cursor. `marks` are the steps that every chart marks: [{step, text}]. */
  constructor(changed = () => {}) {
    Object.assign(this, { whole: [0, 1], range: null, step: null, marks: [], members: new Set(), changed });
    const redraw = () => this.all((member) => member.restyle?.());
    new MutationObserver(redraw).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  }

  /** First and last step shown. */
  get shown() {
    return this.range ?? this.whole;
  }

  /** The step of the cursor; the last one while nobody has pointed anywhere. */
  get cursor() {
    return Math.min(this.step ?? Infinity, this.range?.[1] ?? Infinity, this.whole[1]);
  }

  /** Add a chart: {node, move(), zoom(), restyle(), drop()}. It leaves once its node is off the page. */
  join(member) {
    this.members.add(member);
  }

  /** Drop the charts that are no longer on the page. */
  prune() {
    for (const member of this.members) {
      if (member.node.isConnected) continue;
      this.members.delete(member);
      member.drop?.();
    }
  }

  all(act) {
    this.prune();
    this.members.forEach(act);
  }

  /** Put the cursor at a step, and follow it where it is not shown. */
  moveTo(step) {
    if (step === this.step) return;
    this.step = step;
    const [first, last] = this.shown;
    if (step < first) this.panBy(step - first);
    if (step > last) this.panBy(step - last);
    this.all((member) => member.move());
    this.changed();
  }

  /** Show the steps of a range, of all of them where it is null or as long as the run. */
  zoomTo(range) {
    const [first, last] = this.whole;
    let [from, to] = range ? range.map(Math.round).sort((a, b) => a - b) : this.whole;
    if (to - from < LEAST) [from, to] = [from - LEAST / 2, from + LEAST / 2];
    if (from < first) [from, to] = [first, Math.max(to, first + LEAST)];
    if (to > last) [from, to] = [Math.min(from, last - LEAST), last];
    this.range = from <= first && to >= last ? null : [from, to];
    this.all((member) => {
      member.zoom();
      member.move();
    });
    this.changed();
  }

  /** Show less (factor below 1) or more of the steps around one. */
  zoomBy(factor, around) {
    const [from, to] = this.shown;
    const reach = (end) => around + (end - around) * factor;
    if (factor < 1 && to - from <= LEAST) return;
    this.zoomTo([reach(from), reach(to)]);
  }

  /** Show as many other steps. */
  panBy(steps) {
    if (!this.range) return;
    const [from, to] = this.range;
    const by = Math.max(this.whole[0] - from, Math.min(this.whole[1] - to, Math.round(steps)));
    if (by) this.zoomTo([from + by, to + by]);
  }

  /** Act on a key that zooms; true if it is one. */
  key(name) {
    if (name === "+" || name === "=") this.zoomBy(CLOSER, this.cursor);
    else if (name === "-") this.zoomBy(1 / CLOSER, this.cursor);
    else if (name === "0") this.zoomTo(null);
    else return false;
    return true;
  }
}

/**
 * Let a reader zoom by dragging across a node, move by dragging with Shift, and zoom and move with the wheel.
 * place(): the left edge of the steps in the page and their width in pixels.
 */
export function steer(node, axis, place) {
  const box = el("div", { class: "select", hidden: true });
  node.append(box);
  let press = null; // {x, range, pans, isDrag}
  const share = (event) => {
    const { left, width } = place();
    return Math.max(0, Math.min(1, (event.clientX - left) / width));
  };
  const stepAt = (event, [from, to] = axis.shown) => from + share(event) * (to - from);
  const release = () => {
    press = null;
    box.hidden = true;
  };
  node.addEventListener("pointerdown", (event) => {
    if (event.button === 0) press = { x: event.clientX, at: stepAt(event), range: axis.shown, pans: event.shiftKey, isDrag: false };
  });
  node.addEventListener("pointermove", (event) => {
    axis.moveTo(Math.round(stepAt(event)));
    if (!press) return;
    if (!press.isDrag && Math.abs(event.clientX - press.x) < DRAG) return;
    if (!press.isDrag) node.setPointerCapture(event.pointerId);
    press.isDrag = true;
    const { left, width } = place();
    if (press.pans) {
      const [from, to] = axis.shown;
      axis.panBy(press.at - stepAt(event, [from, to]));
      return;
    }
    const edge = node.getBoundingClientRect().left;
    const [a, b] = [press.x, event.clientX].map((x) => Math.max(left, Math.min(left + width, x)) - edge).sort((one, other) => one - other);
    box.hidden = false;
    Object.assign(box.style, { left: `${a + node.scrollLeft}px`, width: `${b - a}px` });
  });
  node.addEventListener("pointerup", (event) => {
    const last = press;
    release();
    if (!last?.isDrag) return;
    if (!last.pans) axis.zoomTo([last.at, stepAt(event, last.range)]);
    const swallow = (click) => click.stopPropagation(); // a drag is no click
    node.addEventListener("click", swallow, true);
    setTimeout(() => node.removeEventListener("click", swallow, true));
  });
  node.addEventListener("pointercancel", release);
  node.addEventListener("dblclick", () => axis.zoomTo(null));
  node.addEventListener(
    "wheel",
    (event) => {
      const sideways = event.shiftKey && !event.deltaX ? event.deltaY : event.deltaX;
      const [from, to] = axis.shown;
      if (event.ctrlKey || event.metaKey) axis.zoomBy(event.deltaY < 0 ? CLOSER : 1 / CLOSER, stepAt(event));
      else if (axis.range && Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) axis.panBy((sideways / place().width) * (to - from));
      else return;
      event.preventDefault();
    },
    { passive: false },
  );
}

/** A colour of the theme in use, such as "--ink1". */
export function themeColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
