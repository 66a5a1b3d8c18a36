// The chosen candidate, next to the dense model and to a pinned one: measurements, commands, layers and options.
import { button, check, choice, el, scrolling, section, table } from "./dom.js";
import { between, engineering, option, percent, score, short } from "./format.js";
import { change, onChange, state } from "./state.js";
import { Chart, axis } from "./theme.js";
import { tooltip } from "./tooltip.js";

export function drawCandidate(get) {
  const body = el("div", { id: "candidate-body" });
  const place = section("candidate", "Candidate", body);
  const title = place.querySelector("h2");
  let turn = 0;
  let only = false;
  let cost = "flops";

  async function draw() {
    const store = get();
    const mine = ++turn;
    const rows = [state.selected, state.pinned === state.selected ? null : state.pinned].filter((row) => row !== null);
    title.textContent = rows.length ? rows.map((row) => `Trial ${store.columns.id[row]}`).join(" and ") : "Candidate";
    if (!rows.length) return body.replaceChildren(el("p", { text: "Choose a point: in the chart, in the list next to it, or in the table." }));
    const options = await Promise.all(rows.map((row) => store.options(row)));
    if (mine !== turn) return undefined; // another was chosen meanwhile
    const focused = document.activeElement?.id;
    const widths = [null, ...options.map((own) => store.widths(own))];
    if (store.outline) widths[0] = store.outline.columns.map(([, size]) => size);
    const known = widths.every((each) => each !== null) && options.every((each) => each !== null);
    body.replaceChildren(
      actions(store, rows[0]),
      scrolling("Measurements", table(["quantity", "dense", ...names(store, rows), ...(rows[1] === undefined ? [] : ["difference"])], measurements(store, rows, widths), { class: "numbers" })),
      ...commands(store, rows[0]),
      ...(known ? layersOf(store, rows, widths, options) : []),
      ...choices(store, rows, options, !known),
    );
    if (focused) document.getElementById(focused)?.focus();
    return undefined;
  }

  function layersOf(store, rows, widths, options) {
    const layers = widths.map((each, i) => store.layers(each, i ? rows[i - 1] : null));
    const rest = [null, ...rows].map((row) => store.times(row).rest);
    const totals = Object.fromEntries(COSTS.map(({ key }) => [key, layers.map((own, i) => own.reduce((sum, layer) => sum + layer[key], key === "ms" ? rest[i] : 0))]));
    const costs = COSTS.filter(({ key }) => key !== "ms" || rest.every((each) => each !== null));
    if (![...costs.map(({ key }) => key), "width"].includes(cost)) cost = "flops";
    const shown = () => [...layers[0].keys()].filter((i) => layers[0][i][cost]); // of others there is nothing to see
    const canvas = el("div", { class: "chart short", role: "img", "aria-label": "Cost of each layer in forward order; the table below holds the same" });
    const made = new Chart(canvas, (c) => bars(store, rows, layers, shown(), cost, c, canvas.clientWidth), (drawn) => tooltip(drawn, ({ dataIndex }) => {
      const at = shown()[dataIndex];
      const { name, kind } = store.outline.layers[at];
      return [`${name || "the model"} ${kind}`, ...["dense", ...names(store, rows)].map((who, i) => `${who}: ${engineering(layers[i][at][cost])}`)];
    }));
    const list = el("div", {});
    const fill = () => list.replaceChildren(scrolling("Layers", layerTable(store, rows, layers, { options, costs, totals, rest }, only)));
    fill();
    const heads = store.outline.heads.length ? [el("details", {}, el("summary", { text: "Attention heads" }), scrolling("Heads", table(["attribute", "dense", ...names(store, rows)], headRows(store, widths))))] : [];
    return [
      el("h3", { text: "Layers in forward order" }),
      el("div", { class: "controls" },
        choice("cost", [...costs.map(({ key, name }) => [key, name]), ["width", "width"]], cost, (value) => { cost = value; made.again(); }),
        check(rows.length > 1 ? "only where the two differ" : "only what changed", only, (value) => { only = value; fill(); })),
      canvas,
      list,
      ...heads,
    ];
  }

  onChange((changed) => {
    if (["selected", "pinned", "data"].some((name) => changed.has(name))) draw();
    else if (changed.has("best")) {
      const tags = document.getElementById("tags");
      if (tags && state.selected !== null) tags.replaceWith(tagsOf(get(), state.selected));
    }
  });
  draw();
}

const COSTS = [
  { key: "flops", name: "FLOPs", unit: "MACs" },
  { key: "params", name: "parameters", unit: "parameters" },
  { key: "ms", name: "predicted latency", unit: "ms" },
];

const names = (store, rows) => rows.map((row) => `trial ${store.columns.id[row]}`);

function tagsOf(store, row) {
  const tags = [
    store.onFront.has(row) && "on the front",
    row === state.best && "best within the budget",
    store.uniform.has(row) && "uniform pruning",
    store.status(row) !== "ok" && store.status(row),
    store.status(row) === "ok" && !store.eligible(row) && "over a limit: a probe",
  ].filter(Boolean);
  const reason = store.columns.reason[row];
  return el("p", { id: "tags" }, ...tags.map((text) => el("span", { class: "tag", text })), reason ? ` ${reason}` : "");
}

function actions(store, row) {
  const pinned = state.pinned === row;
  const pin = button(pinned ? "Unpin" : "Pin, to compare with another", () => change({ pinned: pinned ? null : row }), { id: "pin" });
  const drop = state.pinned !== null && !pinned ? [button("End comparison", () => change({ pinned: null }), { id: "unpin" })] : [];
  return el("div", {}, tagsOf(store, row), el("div", { class: "controls" }, pin, ...drop));
}

function measurements(store, rows, widths) {
  const { run, dense } = store.head;
  const columns = store.columns;
  const difference = (values, show) => (rows.length > 1 ? [values.every(Number.isFinite) ? signed(values[1] - values[0], show) : ""] : []);
  const scores = rows.map((row) => columns.score[row]);
  const found = [
    [`${run.metric} on validation`, between(dense.score, ...dense.interval), ...rows.map((row) => between(columns.score[row], columns.low[row], columns.high[row])), ...difference(scores, score)],
  ];
  const tests = rows.map((row) => columns.held_out[row] ?? []);
  if (dense.test_score !== null || tests.some((each) => each.length)) {
    found.push([`${run.metric}, held out`, between(dense.test_score, ...dense.test_interval), ...tests.map((each) => (each.length ? between(...each) : "not scored")), ...difference(tests.map((each) => each[0]), score)]);
  }
  for (const { name, unit, dense: all, measured } of store.costs) {
    const values = rows.map((row) => store.column(name)[row]);
    const text = (row, value) => {
      const ends = columns.lower[name]?.[row] !== undefined ? `, ${engineering(columns.lower[name][row])} to ${engineering(columns.upper[name][row])}` : "";
      return `${engineering(value)} (${percent(value / all)}${ends})`;
    };
    const kind = measured && rows.some((row) => store.predicted(name, row) !== null) ? ", measured" : "";
    found.push([`${name}${unit ? ` (${unit})` : ""}${kind}`, engineering(all), ...rows.map((row, i) => text(row, values[i])), ...difference(values, engineering)]);
    const predicted = rows.map((row) => store.predicted(name, row));
    if (predicted.some((value) => value !== null)) {
      found.push([`${name}, predicted`, "", ...predicted.map((value) => (value === null ? "not measured" : `${engineering(value)} (${percent(value / all)})`)), ...difference(predicted, engineering)]);
    }
  }
  if (rows.some((row) => columns.distortion[row] !== null)) {
    const values = rows.map((row) => columns.distortion[row]);
    found.push(["distance to the dense outputs", "0", ...values.map((value) => (value === null ? "" : `${Number(value.toPrecision(3))}`)), ...difference(values, (v) => `${Number(v.toPrecision(3))}`)]);
  }
  if (store.outline && widths.every((each) => each !== null)) found.push(...depth(store, widths, rows));
  return found;
}

/** Units kept and branches kept, of all. */
function depth(store, widths, rows) {
  const sizes = store.outline.columns.map(([, size]) => size);
  const branch = store.outline.columns.map((_, i) => i >= sizes.length - branches(store));
  const sum = (values, of) => values.reduce((all, value, i) => all + (branch[i] === of ? value : 0), 0);
  const line = (label, of) => {
    const found = widths.map((own) => sum(own, of));
    const shown = found.map((value, i) => (i ? `${value} (${percent(value / found[0])})` : `${value}`));
    return [label, ...shown, ...(rows.length > 1 ? [signed(found[2] - found[1], String)] : [])];
  };
  const found = [line("units kept", false)];
  if (branches(store)) found.push(line("residual branches kept", true));
  return found;
}

/** Number of columns that are branches: those at the end that rules or effects can only switch off. */
const branches = (store) => store.outline.branches;

const signed = (value, show) => (value > 0 ? `+${show(value)}` : value < 0 ? `−${show(-value)}` : "0");

function commands(store, row) {
  const { shell, python, saved, hint } = store.head.commands;
  const fill = (text, value) => text.replaceAll("{trial}", String(value));
  const found = [];
  const line = (label, text, id) => {
    const told = el("span", { role: "status", class: "told" });
    const code = el("code", { id, text });
    const copy = button("Copy", () => copyText(text, code).then((done) => (told.textContent = done ? "copied" : "selected; press Ctrl+C")), { id: `copy-${id}`, "aria-label": `Copy: ${label}` });
    found.push(el("div", { class: "command" }, el("h4", { text: label }), el("pre", { tabindex: 0, "aria-label": label }, code), copy, told));
  };
  const id = store.columns.id[row];
  if (shell && saved.includes(id)) line("Build it in a shell", fill(shell, id), "shell");
  if (python) line("Build it in Python", fill(python, row), "python");
  if (shell && !saved.includes(id)) found.push(el("p", { class: "note", text: "Its weights were not saved: those of the front were. Search again, or choose a point of the front." }));
  if (hint) found.push(el("p", { class: "note", text: `Note: ${hint}.` }));
  return [el("h3", { text: "Build" }), ...found];
}

/** Copy text; where the browser refuses, as it may for files, select it instead. */
async function copyText(text, code) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return document.execCommand("copy");
  }
}

function bars(store, rows, layers, shown, cost, c, room) {
  const label = COSTS.find(({ key }) => key === cost)?.unit ?? "features";
  const fill = [c.cloud, c.front, c.uniform];
  const many = shown.length * 15 > room - 90; // names would lie on each other
  const name = (i) => store.outline.layers[i].name || "the model";
  return {
    grid: { left: 64, right: 18, top: 12, bottom: many ? 34 : 100 },
    xAxis: axis(c, {
      type: "category", data: shown.map((i) => `${i}`), splitLine: { show: false },
      name: many ? "layers in forward order" : "", nameGap: 12,
      axisLabel: { show: !many, color: c.ink, rotate: 60, formatter: (i) => short(name(i), 22), interval: 0, fontSize: 11 },
    }),
    yAxis: axis(c, { name: label, nameGap: 50, axisLabel: { color: c.ink, formatter: engineering } }),
    series: layers.map((own, i) => ({
      type: "bar", data: shown.map((j) => own[j][cost] ?? 0), barGap: "0%", barCategoryGap: "25%", itemStyle: { color: fill[i], opacity: i ? 1 : 0.6 },
    })),
  };
}

function layerTable(store, rows, layers, { options, costs, totals, rest }, only) {
  const title = (name) => el("code", { title: name, text: short(name || "the model") });
  const header = ["layer", "class", "width", ...rows.map((row) => `kept by ${store.columns.id[row]}`)];
  const zeros = ({ name }) => (store.sparsity.size ? options.map((own) => store.zeros(name, own)) : []);
  if (store.sparsity.size) header.push(...rows.map((row) => `zeros in ${store.columns.id[row]}`));
  for (const { name } of costs) header.push(`share of ${name}`, ...rows.map((row) => `in ${store.columns.id[row]}`));
  const shown = store.outline.layers.map((layer, i) => [layer, i]).filter(([layer, i]) => !only || differs(layers, i, rows.length) || new Set([...(rows.length > 1 ? [] : [0]), ...zeros(layer).map((each) => each ?? 0)]).size > 1);
  const lines = shown.map(([layer, i]) => {
    const { name, kind } = layer;
    const of = layers.map((own) => own[i]);
    const gone = (layer) => !layer.flops && !layer.params && (of[0].flops || of[0].params);
    const width = (layer) => (gone(layer) ? "dropped" : bar(wide(layer), (layer.width ?? layer.heads?.count) / (of[0].width ?? of[0].heads?.count)));
    const shares = costs.flatMap(({ key }) => of.map((layer, j) => share(layer[key], totals[key][j])));
    return [title(name), kind, wide(of[0]), ...of.slice(1).map((each) => (wide(of[0]) ? width(each) : gone(each) ? "dropped" : "")), ...zeros(layer).map(sparse), ...shares];
  });
  if (costs.some(({ key }) => key === "ms") && !only) {
    const shares = costs.flatMap(({ key }) => rest.map((ms, j) => (key === "ms" ? share(ms, totals.ms[j]) : "")));
    lines.push(["everything else", "", "", ...Array(header.length - 3 - shares.length).fill(""), ...shares]);
  }
  return table(header, lines, { class: "numbers layers", id: "layers" });
}

/** Features and attention heads of a layer. */
function wide({ width, heads }) {
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const attention = heads && plural(heads.count, "head") + (heads.groups === null ? "" : ` in ${plural(heads.groups, "group")}`);
  return [width, attention].filter((each) => each !== null).join(", ");
}

/** Zeros of a weight: a share with its bar, or a pattern. */
const sparse = (zeros) => (typeof zeros === "number" ? bar(percent(zeros), zeros) : (zeros ?? ""));

const share = (part, all) => bar(percent(part / (all || 1)), part / (all || 1));

function differs(layers, i, count) {
  const [a, b] = count > 1 ? [layers[1][i], layers[2][i]] : [layers[0][i], layers[1][i]];
  return a.width !== b.width || a.flops !== b.flops || a.params !== b.params;
}

/** A number above a bar of its share. */
function bar(text, share) {
  return el("span", { class: "bar" }, text, el("i", { "aria-hidden": "true", css: { "--share": `${Math.min(100, 100 * share || 0)}%` } }));
}

function headRows(store, widths) {
  const counts = widths.map((each) => store.heads(each));
  return store.outline.heads.map(({ name }, i) => [el("code", { text: name }), ...counts.map((own) => `${own[i]}`)]);
}

function choices(store, rows, options, open) {
  if (options.some((own) => own === null)) return [el("p", { class: "note", text: "This page was written without the options of trials off the front." })];
  const changed = [...Array(store.dimensions).keys()].filter((j) => options.some((own) => own[j]));
  const lines = changed.map((j) => [
    el("code", { title: store.space.names[j], text: short(store.space.names[j]) }),
    option(store.optionsOf(j)[0]),
    ...options.map((own) => el("span", { class: options[1] && options[0][j] !== options[1][j] ? "differs" : null, text: option(store.optionsOf(j)[own[j]]) })),
  ]);
  const content = scrolling("Options", table(["dimension", "dense", ...names(store, rows)], lines, { class: "numbers", id: "options" }));
  const summary = `Options: ${changed.length} of ${store.dimensions} dimensions changed`;
  return [el("details", { open }, el("summary", { text: summary }), content)];
}
