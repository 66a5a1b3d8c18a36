// Choosing: a slider for each budget, which marks the best point, and the front as a list for the keyboard.
import { button, el } from "./dom.js";
import { engineering, percent, score } from "./format.js";
import { change, onChange, state } from "./state.js";

const STEPS = 1000;
const SCORE = "score";

export function drawChoice(get) {
  const sliders = new Map();
  const answer = el("p", { id: "best", role: "status" });
  const list = el("div", { id: "list", role: "listbox", tabindex: 0, "aria-label": "Points on the front, by cost" });
  const form = el("fieldset", { id: "budget" }, el("legend", { text: "Budget" }));
  const place = document.getElementById("choose");
  place.append(form, el("h3", { text: "Points on the front" }), list);

  function setUp() {
    form.replaceChildren(el("legend", { text: "Budget" }));
    sliders.clear();
    for (const cost of get().limited) if (cost.dense > 0) addCost(cost);
    if (get().head.run.worst_score !== null) addScore();
    form.append(answer, button("Choose this one", () => state.best !== null && change({ selected: state.best }), { id: "take" }));
  }

  function addCost({ name, dense, limit }) {
    const values = get().head.front.map((row) => get().upper(name, row) / dense);
    const most = limit / dense;
    const least = Math.min(most, ...values);
    const low = Math.floor(STEPS * least);
    const high = Math.ceil(STEPS * most - 1e-9);
    const input = el("input", { type: "range", min: low, max: high, step: 1, value: high, id: `budget-${sliders.size}` });
    add(name, input, () => {
      if (Number(input.value) >= high) return { text: `${name} <= ${percent(most)} of dense, ${engineering(limit)}: the limit of the search`, limit, clause: null };
      const tenth = Number(input.value);
      const value = (tenth / 10 / 100) * dense;
      return { text: `${name} <= ${(tenth / 10).toFixed(1)} % of dense, ${engineering(value)}`, limit: value, clause: `${name} <= ${tenth / 10}%` };
    });
  }

  function addScore() {
    const { worst_score: worst, metric, higher_is_better: higher } = get().head.run;
    const scores = get().head.front.map((row) => get().columns.score[row]);
    const top = scores.reduce((a, b) => (higher === b > a ? b : a), worst);
    const input = el("input", { type: "range", min: 0, max: STEPS, step: 1, value: 0, id: `budget-${sliders.size}` });
    const sign = higher ? ">=" : "<=";
    add(SCORE, input, () => {
      const tenth = Number(input.value);
      if (!tenth) return { text: `${metric} ${sign} ${score(worst)}: the limit of the search`, limit: worst, clause: null };
      const value = Number((worst + ((top - worst) * tenth) / STEPS).toPrecision(6));
      const slack = 1e-9 * Math.max(1, Math.abs(get().head.dense.score));
      return { text: `${metric} ${sign} ${value}`, limit: value - (higher ? slack : -slack), clause: `${metric} ${sign} ${value}` };
    });
  }

  function add(name, input, read) {
    const text = el("output", { for: input.id });
    input.addEventListener("input", find);
    input.dataset.name = name;
    sliders.set(name, { input, read, text });
    const label = name === SCORE ? get().head.run.metric : name;
    form.append(el("label", { for: input.id, text: label }), input, text);
  }

  function find() {
    const limits = {};
    const clauses = [];
    let worst = null;
    for (const [name, { input, read, text }] of sliders) {
      const found = read();
      text.textContent = found.text;
      input.setAttribute("aria-valuetext", found.text);
      if (name === SCORE) worst = found.limit;
      else if (found.clause !== null) limits[name] = found.limit;
      if (found.clause !== null) clauses.push(found.clause);
    }
    // A budget that names costs alone asks for the best score, whatever the search minimised.
    const minimises = worst !== null && (clauses.length === 0 || sliders.get(SCORE).read().clause !== null);
    const row = get().best(limits, minimises ? worst : null);
    const call = clauses.length ? `result.best(${JSON.stringify(clauses.join(" and "))})` : "result.best()";
    const columns = get().columns;
    answer.replaceChildren(
      el("code", { text: call }),
      row === null ? " finds no trial; move a slider back" : `: trial ${columns.id[row]}, ${get().head.run.metric} ${score(columns.score[row])}`,
    );
    document.getElementById("take").disabled = row === null;
    change({ best: row });
  }

  const id = (row) => `point-${get().columns.id[row]}`;

  function fill() {
    const { columns, limited, head } = get();
    const name = limited[0].name;
    const options = head.front.map((row) => {
      const value = get().column(name)[row];
      const text = `${columns.id[row]}: ${engineering(value)} (${percent(value / head.dense.costs[name])}), ${score(columns.score[row])}`;
      return el("div", { role: "option", id: id(row), "data-row": row, text, on: { click: () => change({ selected: row }) } });
    });
    list.replaceChildren(...(options.length ? options : [el("div", { role: "option", "aria-disabled": "true", text: head.run.why_empty || "empty" })]));
    mark();
  }

  function mark() {
    let current = null;
    for (const item of list.children) {
      const row = Number(item.dataset.row);
      item.setAttribute("aria-selected", String(row === state.selected));
      item.classList.toggle("is-best", row === state.best);
      if (row === state.selected) current = item;
    }
    if (current) {
      list.setAttribute("aria-activedescendant", current.id);
      const [top, bottom] = [current.offsetTop, current.offsetTop + current.offsetHeight];
      if (top < list.scrollTop) list.scrollTop = top;
      else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
    } else list.removeAttribute("aria-activedescendant");
  }

  list.addEventListener("keydown", (event) => {
    const front = get().head.front;
    const at = front.indexOf(state.selected);
    const to = { ArrowDown: at + 1, ArrowUp: at < 0 ? 0 : at - 1, Home: 0, End: front.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
    if (event.key === "Enter") document.getElementById("candidate-title").focus();
    else if (to !== undefined && front.length) change({ selected: front[Math.min(front.length - 1, Math.max(0, to))] });
    else return;
    event.preventDefault();
  });

  onChange((names) => {
    if (names.has("data")) {
      const before = new Map([...sliders].map(([name, { input }]) => [name, input.value === input.max ? null : input.value]));
      setUp();
      for (const [name, value] of before) if (value !== null && sliders.has(name)) sliders.get(name).input.value = value;
      fill();
      find();
    }
    if (names.has("selected") || names.has("best")) mark();
  });
  setUp();
  fill();
  find();
}
