// Colours of the charts, from the style of the page, so that they follow light, dark and print.

const NAMES = ["ink", "dim", "line", "ground", "cloud", "front", "uniform", "dense", "best", "chosen", "limit", "low", "mid", "top"];
const waiting = new Set();

export function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** A chart in an element, drawn once it comes into view and again when colours or sizes change. */
export class Chart {
  /** `option` makes the option of the chart from colours. */
  constructor(element, option, ready = () => {}) {
    Object.assign(this, { element, option, ready, chart: null });
    waiting.add(this);
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      this.draw();
    }).observe(element);
    new ResizeObserver(() => this.chart?.resize()).observe(element);
  }

  draw(whole = true) {
    const first = !this.chart;
    this.chart ??= charts.init(this.element, null, { renderer: "canvas" });
    this.chart.setOption({ animation: false, ...this.option(colours()) }, whole);
    if (first) this.ready(this.chart);
  }

  /** Draw again if it was drawn before. */
  again() {
    if (this.chart) this.draw();
  }
}

export function redrawAll(force = false) {
  for (const chart of waiting) if (chart.chart || force) chart.draw();
}

for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => redrawAll(query === "print"));
}
addEventListener("beforeprint", () => {
  redrawAll(true);
  for (const chart of waiting) chart.chart.resize();
});

/** Axis of a chart in the colours of the page. */
export function axis(c, more) {
  return {
    type: "value",
    nameLocation: "middle",
    nameTextStyle: { color: c.ink, fontSize: 13 },
    axisLine: { show: true, lineStyle: { color: c.dim } },
    axisTick: { lineStyle: { color: c.dim } },
    axisLabel: { color: c.ink, hideOverlap: true },
    splitLine: { lineStyle: { color: c.line } },
    ...more,
  };
}
