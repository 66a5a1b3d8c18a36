// One tooltip for all charts, next to the pointer; its content is text alone.
import { el } from "./dom.js";

const box = el("div", { id: "tooltip", role: "presentation", hidden: true });

/** Show lines of text, the first one strong, while the pointer is over an item of a chart. */
export function tooltip(chart, linesOf) {
  chart.on("mouseover", (event) => {
    const lines = linesOf(event);
    if (!lines) return;
    box.replaceChildren(...lines.map((text, i) => el(i ? "div" : "strong", { text })));
    document.body.append(box);
    box.hidden = false;
    const pointer = event.event.event;
    const left = Math.min(pointer.clientX + 14, innerWidth - box.offsetWidth - 8);
    const below = pointer.clientY + 14;
    const top = below + box.offsetHeight > innerHeight - 8 ? pointer.clientY - box.offsetHeight - 14 : below;
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${Math.max(8, top)}px`;
  });
  const hide = () => (box.hidden = true);
  chart.on("mouseout", hide);
  chart.getZr().on("globalout", hide);
}
addEventListener("keydown", (event) => {
  if (event.key === "Escape") box.hidden = true;
});
