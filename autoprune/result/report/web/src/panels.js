// Panels that not every search has: convergence, sensitivity, surrogate, racing, audit, what stays, and notes.
import { el, scrolling, section, table } from "./dom.js";
import { engineering, option, percent, score, short } from "./format.js";
import { change, onChange } from "./state.js";
import { Chart, axis } from "./theme.js";
import { tooltip } from "./tooltip.js";

const IDS = ["convergence", "sensitivity", "surrogate", "racing", "audit", "stays", "notes"];
const MOST_CELLS = 4000; // of a heat map that is a table, too

export function drawPanels(get) {
  const draw = () => {
    for (const id of IDS) document.getElementById(id)?.remove();
    const store = get();
    const { panels } = store;
    if (panels.convergence) convergence(panels.convergence, store);
    if (panels.sensitivity) sensitivity(panels.sensitivity, store);
    if (panels.surrogate) surrogate(panels.surrogate);
    if (panels.racing) racing(panels.racing);
    if (panels.audit) audit(panels.audit, store);
    if (store.outline) stays(store.outline.stays);
    notes(store.head.run.notes);
  };
  onChange((names) => names.has("data") && draw());
  draw();
}

function picture(label, short = false) {
  return el("div", { class: short ? "chart short" : "chart", role: "img", "aria-label": label });
}

function lineChart(canvas, points, [x, y], more = {}) {
  const chart = new Chart(canvas, (c) => ({
    grid: { left: 64, right: 18, top: 14, bottom: 46 },
    xAxis: axis(c, { name: x, nameGap: 28, min: 0, axisLabel: { color: c.ink, formatter: engineering } }),
    yAxis: axis(c, { name: y, nameGap: 44, scale: true }),
    series: [{ type: "line", data: points, symbol: points.length > 60 ? "none" : "circle", symbolSize: 6, lineStyle: { color: c.front, width: 2 }, itemStyle: { color: c.front }, ...more }],
  }), (drawn) => tooltip(drawn, ({ data }) => data && [`${x}: ${data[0]}`, `${y}: ${data[1]}`]));
  return chart;
}

function convergence({ cost, trial, value }, store) {
  const canvas = picture(`Hypervolume over trials; it ends at ${value.at(-1)} after ${trial.at(-1)} trials`, true);
  const last = trial.length > 1 && value.at(-1) === value.at(-2) ? trial.at(-2) : trial.at(-1);
  section(
    "convergence",
    "Convergence",
    el("p", { class: "note", text: `Hypervolume: the area that the front of ${store.head.run.metric} and ${cost} covers, in the extent of the final front. It last grew at trial ${last} of ${store.size}.` }),
    canvas,
  );
  lineChart(canvas, trial.map((at, i) => [at, value[i]]), ["trials", "hypervolume"], { step: "end" });
}

function sensitivity({ table: kind, cells }, store) {
  const worth = cells.map((cell) => cell[2]);
  const order = [...worth].sort((a, b) => a - b);
  const rank = new Map(order.map((value, i) => [value, order.length > 1 ? i / (order.length - 1) : 1]));
  const most = Math.max(...cells.map((cell) => cell[1]));
  const canvas = picture("Heat map of the loss of each option of each dimension alone");
  canvas.style.height = `${Math.min(900, Math.max(220, 20 * store.dimensions + 70))}px`;
  const lines = (cell) => {
    const [dimension, at, loss] = cell;
    const own = store.optionsOf(dimension);
    return [store.space.names[dimension], `${option(own[0])} → ${option(own[at])}`, `${kind} ${Number(loss.toPrecision(3))}`];
  };
  const made = section(
    "sensitivity",
    "Sensitivity",
    el("p", { class: "note" }, `Loss (${kind}) of each option alone, where it was measured; coloured by rank: `, el("span", { class: "ramp", "aria-hidden": "true" }), " from the least to the most."),
    canvas,
  );
  if (cells.length <= MOST_CELLS) {
    const rows = [...cells].sort((a, b) => b[2] - a[2]).map((cell) => lines(cell));
    made.append(el("details", {}, el("summary", { text: `The same as a table: ${cells.length} options, the most sensitive first` }), scrolling("Sensitivity", table(["dimension", "option", kind], rows.map(([name, change_, loss]) => [el("code", { title: name, text: short(name) }), change_, loss.slice(kind.length + 1)]), { class: "numbers" }))));
  }
  new Chart(canvas, (c) => ({
    grid: { left: 150, right: 18, top: 10, bottom: 46 },
    xAxis: axis(c, { type: "category", data: [...Array(most).keys()].map((i) => `${i + 1}`), name: "option (1 removes the least)", nameGap: 28, splitLine: { show: false } }),
    yAxis: axis(c, { type: "category", data: store.space.names, inverse: true, splitLine: { show: false }, axisLabel: { color: c.ink, fontSize: 11, formatter: (name) => short(name, 22) } }),
    visualMap: { type: "continuous", show: false, min: 0, max: 1, dimension: 2, inRange: { color: [c.low, c.mid, c.top] } },
    series: [{ type: "heatmap", data: cells.map(([i, j, loss]) => [j - 1, i, rank.get(loss)]), itemStyle: { borderColor: c.ground, borderWidth: store.dimensions > 100 ? 0 : 1 }, emphasis: { itemStyle: { borderColor: c.ink } } }],
  }), (drawn) => tooltip(drawn, ({ dataIndex }) => lines(cells[dataIndex])));
}

function surrogate(told) {
  const canvas = picture("Rank correlation of the surrogate over trials", true);
  const points = told.flatMap((note) => [...note.matchAll(/(-?\d+\.\d+) after (\d+)/g)].map(([, tau, after]) => [Number(after), Number(tau)]));
  section("surrogate", "Optimizer and surrogate", ...told.map((text) => el("p", { text })), ...(points.length > 1 ? [canvas] : []));
  if (points.length > 1) lineChart(canvas, points, ["trials", "Kendall's tau"]);
}

function racing({ raced, scored, samples, share, at, unit }) {
  const canvas = picture(`Histogram of the ${unit} after which trials were stopped`, true);
  const text = `${raced} of ${raced + scored} trials were stopped early. Scoring used ${percent(share)} of the samples that ${raced + scored} full scores of ${samples} take.`;
  const most = Math.max(samples, ...at);
  const bins = 20;
  const counts = Array(bins).fill(0);
  for (const value of at) counts[Math.min(bins - 1, Math.floor((value / most) * bins))]++;
  section("racing", "Early stopping", el("p", { text }), canvas);
  new Chart(canvas, (c) => ({
    grid: { left: 64, right: 18, top: 14, bottom: 46 },
    xAxis: axis(c, { type: "category", data: counts.map((_, i) => engineering(((i + 1) * most) / bins)), name: `${unit}, up to`, nameGap: 28, splitLine: { show: false } }),
    yAxis: axis(c, { name: "trials stopped", nameGap: 40, minInterval: 1 }),
    series: [{ type: "bar", data: counts, itemStyle: { color: c.front } }],
  }), (drawn) => tooltip(drawn, ({ dataIndex }) => [`${counts[dataIndex]} trials`]));
}

function audit(found, store) {
  const names = found.evaluators.map(({ name }) => name);
  const charts_ = names.map((name) => [name, picture(`Trained against cheap score by ${name}`, true)]);
  const tau = ([value, low, high]) => (value === null ? "unknown" : `${value.toFixed(2)}${low === null ? "" : ` (${low.toFixed(2)} to ${high.toFixed(2)})`}`);
  const rows = found.rows.map((row) => [`${row.trial}`, engineering(row.cost), ...names.map((name) => score(row.scores[name])), row.trained === null ? row.reason : score(row.trained)]);
  const variants = Object.entries(found.variants).map(([name, { cost, trained }]) => [name, engineering(cost), trained.map(score).join(", ")]);
  section(
    "audit",
    "Audit",
    ...[found.verdict, found.comparison, found.origin, ...found.notes].filter(Boolean).map((text) => el("p", { text })),
    scrolling("Rank correlations", table(["evaluator", "Kendall's tau", "at nearly equal cost"], found.evaluators.map(({ name, tau: all, in_band: band }) => [name, tau(all), tau(band)]), { class: "numbers" })),
    el("div", { class: "pair" }, ...charts_.map(([, canvas]) => canvas)),
    el("details", {}, el("summary", { text: `${rows.length} trained candidates` }), scrolling("Trained candidates", table(["trial", found.cost, ...names, "trained"], rows, { class: "numbers" }))),
    ...(variants.length ? [scrolling("Control networks", table(["control network", found.cost, "trained"], variants, { class: "numbers" }))] : []),
  );
  for (const [name, canvas] of charts_) {
    const points = found.rows.filter((row) => row.trained !== null && row.scores[name] !== null).map((row) => [row.scores[name], row.trained, row.trial]);
    new Chart(canvas, (c) => ({
      grid: { left: 64, right: 18, top: 14, bottom: 46 },
      xAxis: axis(c, { name: `${found.metric} by ${name}`, nameGap: 28, scale: true }),
      yAxis: axis(c, { name: "after training", nameGap: 48, scale: true }),
      series: [{ type: "scatter", data: points, symbolSize: 9, itemStyle: { color: c.front } }],
    }), (drawn) => {
      tooltip(drawn, ({ data }) => data && [`trial ${data[2]}`, `before ${score(data[0])}`, `trained ${score(data[1])}`]);
      drawn.on("click", ({ data }) => data && store.rowOf.has(data[2]) && change({ selected: store.rowOf.get(data[2]) }));
    });
  }
}

function stays(parts) {
  const rows = parts.map(({ reason, tensors, more, params_share: share, remedy }) => [
    el("span", {}, reason, remedy ? el("span", { class: "remedy", text: remedy }) : ""),
    percent(share),
    el("code", { text: `${tensors.join(", ")}${more ? ` and ${more} more` : ""}` }),
  ]);
  section(
    "stays",
    "What stays, and why",
    el("p", { class: "note", text: "Parameters that cannot shrink along some dimension, with their share of all; they may shrink along another one." }),
    rows.length ? scrolling("What stays", table(["reason, and what helps", "parameters", "which"], rows, { class: "stays" })) : el("p", { text: "Nothing." }),
  );
}

function notes(texts) {
  if (texts.length) section("notes", "Notes", el("ul", {}, ...texts.map((text) => el("li", { text }))));
}
