// All trials in a table that sorts, filters and goes to a CSV file.
import { button, el, scrolling, section } from "./dom.js";
import { engineering, option, percent, score } from "./format.js";
import { change, onChange, state } from "./state.js";

const PAGE = 25;
const TERM = /([A-Za-z_][\w.]*)\s*(<=|>=|<|>|=)\s*(-?[\d.]+(?:e[+-]?\d+)?)\s*([%KMGT]?)|"([^"]*)"|(\S+)/gi;
const FACTORS = { K: 1e3, M: 1e6, G: 1e9, T: 1e12 };

export function drawTable(get) {
  let sorted = { key: "trial", down: false };
  let page = 0;
  let rows = [];
  const columns = () => [
    { key: "trial", value: (row) => get().columns.id[row], show: String },
    { key: "status", value: (row) => status(get(), row), show: String },
    { key: "score", title: get().head.run.metric, value: (row) => get().columns.score[row], show: score },
    { key: "held_out", title: "held out", value: (row) => get().columns.held_out[row]?.[0] ?? null, show: score },
    ...get().costs.map(({ name, dense }) => ({ key: name, value: (row) => get().column(name)[row], dense, show: (v) => `${engineering(v)} (${percent(v / dense)})` })),
    { key: "distortion", value: (row) => get().columns.distortion[row], show: (v) => `${Number(v.toPrecision(3))}` },
  ];
  const filter = el("input", { type: "search", id: "filter", size: 34, spellcheck: "false", "aria-describedby": "filter-help", on: { input: () => { page = 0; draw(); } } });
  const count = el("p", { id: "count", role: "status" });
  const place = el("div", {});
  const pages = el("div", { class: "controls", role: "group", "aria-label": "Pages" });
  section(
    "trials",
    "All trials",
    el("div", { class: "controls" }, el("label", {}, "filter ", filter), button("Download CSV", () => download(get(), columns(), rows), { id: "csv" })),
    el("p", { id: "filter-help", class: "note", text: 'Words, such as front, uniform, failed or a reason; and comparisons, such as score > 0.9 or flops <= 50%.' }),
    count,
    place,
    pages,
  );

  function draw() {
    const all = columns();
    const by = all.find((column) => column.key === sorted.key) ?? all[0];
    const tests = parsed(filter.value, all, get());
    rows = [...Array(get().size).keys()].filter((row) => tests.every((test) => test(row)));
    rows.sort((a, b) => compare(by.value(a), by.value(b), sorted.down) || a - b);
    const last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
    page = Math.min(page, last);
    const shown = rows.slice(page * PAGE, (page + 1) * PAGE);
    const focused = document.activeElement?.id;
    place.replaceChildren(scrolling("All trials", grid(all, shown)));
    count.textContent = `${rows.length} of ${get().size} trials${rows.length ? `, ${page * PAGE + 1} to ${page * PAGE + shown.length} shown` : ""}`;
    const go = (text, to, id) => button(text, () => { page = to; draw(); }, { disabled: to < 0 || to > last || to === page, id });
    pages.replaceChildren(go("First", 0, "first"), go("Previous", page - 1, "previous"), go("Next", page + 1, "next"), go("Last", last, "last"));
    if (focused) document.getElementById(focused)?.focus();
  }

  function grid(all, shown) {
    const head = all.map(({ key, title }) => {
      const order = key === sorted.key ? (sorted.down ? "descending" : "ascending") : "none";
      const sort = button(title ?? key, () => { sorted = { key, down: key === sorted.key && !sorted.down }; page = 0; draw(); }, { id: `sort-${key}` });
      return el("th", { scope: "col", "aria-sort": order }, sort);
    });
    const body = shown.map((row) => {
      const cells = all.map(({ value, show }, i) => {
        const own = value(row);
        const text = own === null || own === undefined ? "" : show(own);
        if (i) return el("td", { text });
        const pick = button(text, () => change({ selected: row }), { "aria-label": `Choose trial ${text}`, id: `row-${text}`, "aria-pressed": String(row === state.selected) });
        return el("th", { scope: "row" }, pick);
      });
      return el("tr", { class: [row === state.selected && "is-chosen", get().onFront.has(row) && "is-front"].filter(Boolean).join(" ") || null, "data-row": row }, ...cells);
    });
    return el("table", { class: "numbers", id: "all" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  }

  onChange((names) => {
    if (names.has("data")) draw();
    if (!names.has("selected")) return;
    for (const line of place.querySelectorAll("tr[data-row]")) {
      const chosen = Number(line.dataset.row) === state.selected;
      line.classList.toggle("is-chosen", chosen);
      line.querySelector("button").setAttribute("aria-pressed", String(chosen));
    }
  });
  draw();
}

function status(store, row) {
  const words = [store.status(row)];
  if (words[0] === "ok" && !store.eligible(row)) words[0] = "probe";
  if (store.onFront.has(row)) words.push("front");
  if (store.uniform.has(row)) words.push("uniform");
  return words.join(", ");
}

/** Order values; what is unknown comes last in either direction. */
function compare(a, b, down) {
  const [unknownA, unknownB] = [a === null || a === undefined, b === null || b === undefined];
  if (unknownA || unknownB) return unknownA - unknownB;
  const order = a < b ? -1 : a > b ? 1 : 0;
  return down ? -order : order;
}

/** Conditions of a filter, all of which must hold. */
function parsed(text, columns, store) {
  const tests = [];
  for (const [, name, sign, number, unit, quoted, word] of text.matchAll(TERM)) {
    const column = name && columns.find(({ key, title }) => [key, title].includes(name) || key === name.toLowerCase());
    if (column) {
      const factor = unit === "%" ? (column.dense ?? 1) / 100 : (FACTORS[unit.toUpperCase()] ?? 1);
      const limit = Number(number) * factor;
      const holds = { "<": (v) => v < limit, ">": (v) => v > limit, "<=": (v) => v <= limit, ">=": (v) => v >= limit, "=": (v) => v === limit }[sign];
      tests.push((row) => column.value(row) !== null && holds(column.value(row)));
    } else {
      const wanted = (quoted ?? word ?? `${name} ${sign} ${number}${unit}`).toLowerCase();
      tests.push((row) => `${store.columns.id[row]} ${status(store, row)} ${store.columns.reason[row] ?? ""}`.toLowerCase().includes(wanted));
    }
  }
  return tests;
}

async function download(store, columns, rows) {
  const full = await store.unpacked();
  const header = [...columns.map(({ key }) => key), "low", "high", "reason", ...(full ? store.space.names : [])];
  const lines = [header.map(quoted).join(",")];
  for (const row of rows) {
    const values = [...columns.map(({ value }) => value(row)), store.columns.low[row], store.columns.high[row], store.columns.reason[row] ?? ""];
    if (full) {
      const options = store.atOnce(row);
      for (let j = 0; j < store.dimensions; j++) values.push(store.optionsOf(j)[options[j]]);
    }
    lines.push(values.map(quoted).join(","));
  }
  const link = el("a", { href: URL.createObjectURL(new Blob([`${lines.join("\r\n")}\r\n`], { type: "text/csv" })), download: "trials.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** A cell of CSV; text that a spreadsheet would take for a formula is kept text by an apostrophe. */
function quoted(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
