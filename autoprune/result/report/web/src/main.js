// The page: reads its data, draws the front first and the rest after it.
import { drawCandidate } from "./candidate.js";
import { drawChoice } from "./choose.js";
import { el } from "./dom.js";
import { drawFront } from "./front.js";
import { drawPanels } from "./panels.js";
import { change, refresh, state } from "./state.js";
import { Store } from "./store.js";
import { drawTable } from "./table.js";
import { watch } from "./watch.js";

const root = document.documentElement;
const parts = () => Object.fromEntries(["head", "bulk", "candidates"].map((name) => [name, JSON.parse(document.getElementById(`data-${name}`).textContent)]));
let store;
const get = () => store;

const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

function summary() {
  const { run } = store.head;
  const { counts } = run;
  const others = ["raced", "failed", "pending"].filter((name) => counts[name]).map((name) => `, ${counts[name]} ${name}`).join("");
  const text = `${store.size} trials${others}; ${store.head.front.length} on the front; ${run.metric}, ${run.higher_is_better ? "higher" : "lower"} is better; ${Math.round(run.seconds)} s, ended by: ${run.stopped}; ${run.space}; autoprune ${run.autoprune}`;
  document.getElementById("summary").textContent = text;
}

async function begin() {
  store = await Store.read(parts());
  document.querySelector("section.plain").remove();
  summary();
  drawFront(get).draw();
  drawChoice(get);
  change({ selected: state.best ?? store.head.front[0] ?? null });
  drawCandidate(get);
  root.dataset.ready = "interactive";
  performance.mark("interactive");
  await painted();
  drawTable(get);
  drawPanels(get);
  await painted();
  await store.unpacked();
  root.dataset.ready = "complete";
  performance.mark("complete");
  const { live } = document.body.dataset;
  if (live) watch(live, follow);
}

/** Take new data; trials keep their numbers, so that what was chosen stays. */
async function follow(fresh) {
  const id = (row) => (row === null ? null : store.columns.id[row]);
  const [selected, pinned] = [id(state.selected), id(state.pinned)];
  store = await Store.read(fresh);
  const row = (number) => (number === null ? null : (store.rowOf.get(number) ?? null));
  state.selected = row(selected);
  state.pinned = row(pinned);
  summary();
  refresh();
  if (state.selected === null && state.best !== null) change({ selected: state.best });
}

begin().catch((error) => {
  document.getElementById("main").append(el("p", { role: "alert", text: `This page could not be drawn: ${error.message}. The table above holds the front.` }));
  throw error;
});
