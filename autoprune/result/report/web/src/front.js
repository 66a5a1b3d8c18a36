// The front and all trials in a chart of any two quantities.
import { button, check, choice, el, section } from "./dom.js";
import { between, engineering, option, percent, score, short } from "./format.js";
import { change, onChange, state } from "./state.js";
import { Chart, axis } from "./theme.js";
import { tooltip } from "./tooltip.js";

const MOST_BARS = 300; // intervals that are drawn
const LARGE = 2000; // points from which they are drawn as one

export function quantities(store) {
  const units = store.costs.map(({ name, unit }) => [name, unit ? `${name} (${unit})` : name]);
  return [["score", store.head.run.metric], ...units];
}

export function drawFront(get) {
  const store = get();
  state.x ??= store.limited[0].name;
  const names = quantities(store);
  const logX = check("log x", false, (logX) => change({ logX }));
  const logY = check("log y", false, (logY) => change({ logY }));
  const best = el("input", {
    type: "number", min: 1, max: 100, step: 1, value: 100, inputmode: "numeric",
    on: { change: () => change({ share: Math.min(100, Math.max(1, Number(best.value) || 100)) }) },
  });
  const controls = el(
    "div",
    { class: "controls", role: "group", "aria-label": "Axes and zoom" },
    choice("x", names, state.x, (x) => change({ x })),
    choice("y", names, state.y, (y) => change({ y })),
    logX,
    logY,
    el("label", {}, "best ", best, " % of trials"),
    check("probes and stopped trials", true, (others) => change({ others })),
    button("Zoom in", () => zoom(0.5)),
    button("Zoom out", () => zoom(2)),
    button("Whole", () => zoom(Infinity)),
  );
  const canvas = el("div", { class: "chart", id: "front-chart", role: "img" });
  const legend = el("p", { class: "legend" });
  section("front", "Front", controls, el("div", { class: "beside" }, el("div", {}, canvas, legend), el("div", { id: "choose" })));
  let view = [0, 100, 0, 100];
  let rows = [];

  const chart = new Chart(canvas, build, (drawn) => {
    drawn.on("click", ({ seriesIndex, dataIndex }) => {
      const row = rows[seriesIndex]?.[dataIndex];
      if (row !== undefined && row >= 0) change({ selected: row });
    });
    tooltip(drawn, ({ seriesIndex, dataIndex }) => lines(get(), rows[seriesIndex]?.[dataIndex]));
    drawn.on("datazoom", () => {
      const [a, b] = drawn.getOption().dataZoom;
      view = [a.start, a.end, b.start, b.end];
    });
  });

  function zoom(factor) {
    const spread = (start, end) => {
      const middle = (start + end) / 2;
      const half = Math.min(50, Math.max(0.5, (factor * (end - start)) / 2));
      const from = Math.max(0, Math.min(middle - half, 100 - 2 * half));
      return [from, from + 2 * half];
    };
    view = [...spread(view[0], view[1]), ...spread(view[2], view[3])];
    chart.draw();
  }

  function build(c) {
    const now = get();
    const parts = pointsOf(now);
    const all = parts.flatMap((part) => part.data);
    const ranges = [0, 1].map((at) => extent(all.map((point) => point[at]), [state.logX, state.logY][at]));
    rows = parts.map((part) => part.data.map((point) => point[2]));
    const series = parts.map((part) => styled(part, c));
    series.push(...limits(now, ranges, c));
    canvas.setAttribute("aria-label", describe(now));
    legend.replaceChildren(...keys(parts));
    const make = (name, log, range, more) =>
      axis(c, {
        type: log ? "log" : "value",
        name: Object.fromEntries(quantities(now))[name],
        min: range[0],
        max: range[1],
        axisLabel: { color: c.ink, hideOverlap: true, formatter: (v) => (name === "score" ? `${Number(v.toPrecision(4))}` : engineering(v)), showMinLabel: false, showMaxLabel: false },
        ...more,
      });
    const inside = { type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, filterMode: "none" };
    return {
      grid: { left: 64, right: 18, top: 14, bottom: 52 },
      xAxis: make(state.x, state.logX, ranges[0], { nameGap: 30 }),
      yAxis: make(state.y, state.logY, ranges[1], { nameGap: 50 }),
      dataZoom: [
        { ...inside, xAxisIndex: 0, start: view[0], end: view[1] },
        { ...inside, yAxisIndex: 0, start: view[2], end: view[3] },
      ],
      series,
    };
  }

  onChange((names) => {
    if (["x", "y", "logX", "logY", "share"].some((name) => names.has(name))) view = [0, 100, 0, 100];
    if (names.has("x") || names.has("y") || names.has("data")) {
      for (const [label, axisName] of [[logX, state.x], [logY, state.y]]) {
        const positive = get().column(axisName).every((value) => value === null || value > 0);
        label.querySelector("input").disabled = !positive;
      }
    }
    chart.again();
  });
  return chart;
}

/** Series of the chart, from the back to the front, each with points of x, y and the row; row -1 is the dense model. */
function pointsOf(store) {
  const [xs, ys] = [store.column(state.x), store.column(state.y)];
  const point = (row) => (row === -1 ? [store.dense(state.x), store.dense(state.y), -1] : [xs[row], ys[row], row]);
  const known = ([x, y]) => x !== null && y !== null && (!state.logX || x > 0) && (!state.logY || y > 0);
  const shown = new Set(kept(store));
  const rows = [...Array(store.size).keys()].filter((row) => shown.has(row) && !store.onFront.has(row));
  const line = state.y === "score" && state.x === store.limited[0].name && store.limited.length === 1;
  const picked = (row) => (row === null ? [] : [row]);
  const parts = [
    { key: "others", label: "probes and stopped trials", of: state.others ? rows.filter((row) => !store.eligible(row)) : [] },
    { key: "cloud", label: "trials", of: rows.filter((row) => store.eligible(row)) },
    { key: "bars", of: [] },
    { key: "front", label: "front", of: store.head.front, line },
    { key: "uniform", label: "uniform pruning", of: [...store.uniform].filter((row) => shown.has(row)) },
    { key: "dense", label: "dense model", of: [-1] },
    { key: "best", label: "best within the budget", of: picked(state.best) },
    { key: "pinned", label: "pinned", of: picked(state.pinned) },
    { key: "chosen", label: "chosen", of: picked(state.selected) },
  ];
  for (const part of parts) part.data = part.of.map(point).filter(known);
  if (state.y === "score" && store.head.front.length <= MOST_BARS) {
    const [low, high] = [store.column("low"), store.column("high")];
    for (const row of store.head.front) {
      if (low[row] === null || (state.logY && low[row] <= 0)) continue;
      parts[2].data.push([xs[row], low[row]], [xs[row], high[row]], [null, null]);
    }
  }
  return parts;
}

/** Rows that are finished, of these the best share by score. */
function kept(store) {
  const scores = store.column("score");
  const done = [...Array(store.size).keys()].filter((row) => scores[row] !== null);
  if (state.share >= 100) return done;
  done.sort((a, b) => store.direction * (scores[b] - scores[a]));
  return done.slice(0, Math.max(1, Math.round((done.length * state.share) / 100)));
}

function extent(values, log) {
  const known = values.filter((value) => value !== null && Number.isFinite(value) && (!log || value > 0));
  let [low, high] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  if (!known.length) return [log ? 1 : 0, log ? 10 : 1];
  if (log) return [low / 1.1, high * 1.1];
  const gap = high - low || Math.abs(high) || 1;
  [low, high] = [low - 0.05 * gap, high + 0.05 * gap];
  return [low, high];
}

function styled({ key, data, line }, c) {
  const scatter = { type: "scatter", data, name: key, emphasis: { scale: 1.4 } };
  const ring = (colour, size, type = "solid") => ({
    ...scatter, symbol: "circle", symbolSize: size, z: 9, silent: true,
    itemStyle: { color: "transparent", borderColor: colour, borderWidth: 3, borderType: type },
  });
  const large = data.length > LARGE;
  switch (key) {
    case "others":
      return { ...scatter, symbolSize: 4, large, largeThreshold: LARGE, itemStyle: { color: c.cloud, opacity: 0.35 } };
    case "cloud":
      return { ...scatter, symbolSize: 6, large, largeThreshold: LARGE, itemStyle: { color: c.cloud, opacity: 0.75 } };
    case "bars":
      return { type: "line", data, silent: true, symbol: "none", lineStyle: { color: c.front, width: 1, opacity: 0.6 } };
    case "front":
      return line
        ? { type: "line", data, name: key, symbol: "circle", symbolSize: 9, showAllSymbol: true, z: 5, lineStyle: { color: c.front, width: 2 }, itemStyle: { color: c.front } }
        : { ...scatter, symbolSize: 9, z: 5, itemStyle: { color: c.front } };
    case "uniform":
      return { ...scatter, symbol: "triangle", symbolSize: 13, z: 6, itemStyle: { color: c.uniform, borderColor: c.ground, borderWidth: 1 } };
    case "dense":
      return { ...scatter, symbol: "diamond", symbolSize: 15, z: 6, itemStyle: { color: c.dense, borderColor: c.ground, borderWidth: 1 } };
    case "best":
      return { ...scatter, symbol: "rect", symbolSize: 12, z: 7, itemStyle: { color: c.best, borderColor: c.ground, borderWidth: 1 } };
    case "pinned":
      return ring(c.chosen, 20, "dashed");
    default:
      return ring(c.chosen, 20);
  }
}

/** Lines at the limits of the search. */
function limits(store, [xs, ys], c) {
  const at = (name) => (name === "score" ? store.head.run.worst_score : store.costs.find((cost) => cost.name === name).limit);
  const dense = (name) => name !== "score" && at(name) === store.dense(name);
  const line = (data) => ({ type: "line", data, silent: true, symbol: "none", lineStyle: { color: c.limit, width: 1.5, type: "dashed" } });
  const found = [];
  if (at(state.x) !== null && !dense(state.x)) found.push(line([[at(state.x), ys[0]], [at(state.x), ys[1]]]));
  if (at(state.y) !== null && !dense(state.y)) found.push(line([[xs[0], at(state.y)], [xs[1], at(state.y)]]));
  return found;
}

function keys(parts) {
  return parts
    .filter((part) => part.label && part.data.length)
    .map(({ key, label, data }) => {
      const count = ["others", "cloud", "front"].includes(key) ? `${data.length} ` : "";
      return el("span", { class: `key ${key}` }, el("i", { "aria-hidden": "true" }), `${count}${label}`);
    });
}

function describe(store) {
  const { run, front } = store.head;
  const names = Object.fromEntries(quantities(store));
  return `${names[state.y]} against ${names[state.x]}: ${store.size} trials, ${front.length} on the front of ${run.budget}. The list next to it and the table below hold the same.`;
}

/** Lines of a tooltip: what the candidate is. */
function lines(store, row) {
  if (row === undefined) return null;
  const { run, dense } = store.head;
  if (row === -1) {
    const costs = store.costs.map(({ name }) => `${name} ${engineering(dense.costs[name])}`);
    return ["dense model", `${run.metric} ${between(dense.score, ...dense.interval)}`, ...costs];
  }
  const { id, score: scores, low, high } = store.columns;
  const tags = [store.onFront.has(row) && "front", store.uniform.has(row) && "uniform", store.status(row) !== "ok" && store.status(row)].filter(Boolean);
  const costs = store.costs.map(({ name }) => {
    const value = store.column(name)[row];
    return `${name} ${engineering(value)} (${percent(value / dense.costs[name])} of dense)`;
  });
  return [
    `trial ${id[row]}${tags.length ? `: ${tags.join(", ")}` : ""}`,
    `${run.metric} ${between(scores[row], low[row], high[row])}`,
    ...costs,
    ...changes(store, row),
  ];
}

/** The first of a candidate's changed dimensions, those nearest to their last option first. */
function changes(store, row) {
  const options = store.atOnce(row);
  if (!options) return [];
  const share = (j) => options[j] / Math.max(1, store.optionsOf(j).length - 1);
  const changed = [...options.keys()].filter((j) => options[j]).sort((a, b) => share(b) - share(a));
  const shown = changed.slice(0, 5).map((j) => `${short(store.space.names[j], 36)}: ${option(store.optionsOf(j)[0])} → ${option(store.optionsOf(j)[options[j]])}`);
  return changed.length > 5 ? [...shown, `and ${changed.length - 5} more`] : shown;
}
