// Numbers as text.

const PREFIXES = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "K"],
];

/** Three digits and a decimal prefix, such as 1.23M. */
export function engineering(value) {
  if (!Number.isFinite(value)) return "";
  for (const [factor, prefix] of PREFIXES) {
    if (Math.abs(value) >= factor) return `${Number((value / factor).toPrecision(3))}${prefix}`;
  }
  return `${Number(value.toPrecision(4))}`;
}

export const percent = (share, digits = 1) => (Number.isFinite(share) ? `${(100 * share).toFixed(digits)} %` : "");

export function score(value) {
  if (!Number.isFinite(value)) return "";
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toPrecision(4) : value.toFixed(4);
}

/** A score with its interval, where that is known. */
export function between(value, low, high) {
  const ends = Number.isFinite(low) && Number.isFinite(high) ? ` (${score(low)} to ${score(high)})` : "";
  return `${score(value)}${ends}`;
}

/** An option of a dimension: a width, a share of zeros, or a word. */
export const option = (value) =>
  typeof value === "number" && !Number.isInteger(value) ? `${Number(value.toPrecision(4))}` : String(value);

/** A long name, shortened in the middle; the whole name belongs into a title. */
export const short = (name, most = 48) =>
  name.length <= most ? name : `${name.slice(0, Math.ceil(most / 2))}…${name.slice(-Math.floor(most / 2) + 1)}`;
