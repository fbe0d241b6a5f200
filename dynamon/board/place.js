// Where a reader is, in the address of the page: links can be shared, and the back button works.
//
// A place is {view, step, steps ("first-last"), quantity, run, run2, ..., layer, layer2, ...}, all of them text.

const PREFIX = "p.dynamon."; // of what TensorBoard leaves in its address for a plugin
const TAB = "dynamon";

export class Place {
  constructor() {
    this.page = window;
    try {
      if (window.parent !== window && window.parent.location.origin === window.location.origin) this.page = window.parent;
    } catch {
      // TensorBoard's page is out of reach: the address of the frame serves
    }
    this.prefix = this.page === window ? "" : PREFIX;
  }

  /** What the address says; null where TensorBoard shows another tab. */
  read() {
    const parts = this.page.location.hash.slice(1).split("&").filter(Boolean);
    if (this.prefix && parts[0] !== TAB) return null;
    const pairs = parts.filter((part) => part.startsWith(this.prefix) && part.includes("=")).map((part) => {
      const [key, value] = part.slice(this.prefix.length).split(/=(.*)/s);
      return [key, unescaped(value)];
    });
    return Object.fromEntries(pairs);
  }

  /** Say so in the address; isNew: as a place to go back from. */
  write(values, isNew) {
    const known = this.read();
    if (!known || sameItems(known, values)) return;
    const others = this.prefix ? this.page.location.hash.slice(1).split("&").filter((part) => !part.startsWith(this.prefix)) : [];
    const own = Object.entries(values).map(([key, value]) => `${this.prefix}${key}=${encodeURIComponent(value).replaceAll("%2F", "/")}`);
    const { history } = this.page;
    const hash = `#${[...others, ...own].join("&")}`;
    if (isNew) history.pushState(history.state, "", hash);
    else history.replaceState(history.state, "", hash);
  }

  /** Call go(place) when the reader goes back or forward, or changes the address; stay() where that names no place. */
  follow(go, stay) {
    this.page.addEventListener("popstate", () => {
      const values = this.read();
      if (values) Object.keys(values).length ? go(values) : stay();
    });
  }
}

/** The values of key, key2, key3 ... */
export function listed(values, key) {
  const found = [];
  for (let i = 1; values[i > 1 ? key + i : key] !== undefined; i += 1) found.push(values[i > 1 ? key + i : key]);
  return found;
}

/** Items for key, key2, key3 ... */
export function numbered(key, values) {
  return Object.fromEntries(values.map((value, i) => [i ? `${key}${i + 1}` : key, value]));
}

function unescaped(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function sameItems(one, other) {
  const keys = Object.keys(one);
  return keys.length === Object.keys(other).length && keys.every((key) => one[key] === other[key]);
}
