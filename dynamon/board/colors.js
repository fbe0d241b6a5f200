// Perceptually even colour maps that colour-blind readers can use, from 17 of their colours; linear in between.

const ANCHORS = {
  viridis:
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
  cividis:
    "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
};
export const MAPS = Object.keys(ANCHORS);
export const INFINITE = [230, 0, 120];
export const BELOW = [128, 128, 128];
export const [NEGATIVE, POSITIVE] = [[222, 110, 8], [38, 128, 216]];
export const UNSURE = [128, 128, 128, 48]; // what may be zero
export const FAINTEST = 70; // opacity of the smallest values, of 255

/** 256 colours as [r, g, b]. */
export function colorTable(name) {
  const anchors = ANCHORS[name].split(" ").map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, index) => {
    const place = (index / 255) * (anchors.length - 1);
    const left = Math.min(Math.floor(place), anchors.length - 2);
    return [0, 1, 2].map((k) => Math.round(anchors[left][k] + (place - left) * (anchors[left + 1][k] - anchors[left][k])));
  });
}

/** From value to [r, g, b], or null where there is no value. */
export function colorScale(name, low, high, isLog) {
  const table = colorTable(name);
  const shape = isLog ? Math.log : (value) => value;
  const from = shape(low);
  const span = shape(high) - from || 1;
  return (value) => {
    if (Number.isNaN(value)) return null;
    if (!Number.isFinite(value)) return INFINITE;
    if (isLog && value <= 0) return BELOW;
    return table[Math.max(0, Math.min(255, Math.round((255 * (shape(value) - from)) / span)))];
  };
}

/** From value to [r, g, b, opacity] by its sign and the root of its size, on dark and light pages alike; null: no value. */
export function signedScale(most) {
  const strength = (value) => FAINTEST + (255 - FAINTEST) * Math.sqrt(Math.min(1, Math.abs(value) / most));
  return (value) => (Number.isNaN(value) ? null : [...(value < 0 ? NEGATIVE : POSITIVE), Math.round(strength(value))]);
}
