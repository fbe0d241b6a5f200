// Making elements. Text is only ever set as text, so names of tags and layers are never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties (on* are listeners), data and children; strings become text. */
export function el(name, properties = {}, ...children) {
  return filled(document.createElement(name), properties, children);
}

/** The same for SVG. */
export function svg(name, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, name), properties, children);
}

function filled(node, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

/** A labelled choice; `change` gets the chosen value. */
export function choice(label, options, value, change) {
  const select = el("select", { onchange: () => change(select.value) });
  for (const [key, text] of options) select.append(el("option", { value: key, selected: key === value }, text));
  return el("label", { class: "choice" }, label, select);
}

/** Call `draw(width)` now and whenever the width of an element changes. */
export function onWidth(node, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth);
    if (width && width !== last) draw((last = width));
  }).observe(node);
}
