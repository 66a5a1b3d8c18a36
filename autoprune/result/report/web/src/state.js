// The state of the page, and who is told when it changes.

export const state = {
  x: null,
  y: "score",
  logX: false,
  logY: false,
  share: 100,
  others: true,
  selected: null,
  pinned: null,
  best: null,
};

const listeners = [];

/** Call `run` with the names of what changed, after every change. */
export function onChange(run) {
  listeners.push(run);
}

export function change(values) {
  const names = new Set(Object.keys(values).filter((name) => state[name] !== values[name]));
  Object.assign(state, values);
  if (names.size) for (const run of listeners) run(names);
}

/** Tell everyone that the data is new. */
export function refresh() {
  for (const run of listeners) run(new Set(["data"]));
}
