// Elements, made without markup, so that no text is ever read as HTML.

/** Make an element; `on` holds listeners, `css` properties of its style, `text` its content. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, run] of Object.entries(value)) made.addEventListener(event, run);
    else if (name === "css") for (const [key, each] of Object.entries(value)) made.style.setProperty(key, each);
    else if (name === "text") made.textContent = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Make a table: header texts, rows of texts or elements; the first cell of a row is its header. */
export function table(header, rows, attributes = {}) {
  const cell = (tag, content, scope) =>
    content instanceof Node ? el(tag, { scope }, content) : el(tag, { scope, text: content ?? "" });
  const head = el("thead", {}, el("tr", {}, ...header.map((each) => cell("th", each, "col"))));
  const body = rows.map((row) => el("tr", {}, ...row.map((each, i) => cell(i ? "td" : "th", each, i ? null : "row"))));
  return el("table", attributes, head, el("tbody", {}, ...body));
}

/** Make a part of the page that scrolls sideways, and with the keyboard. */
export function scrolling(label, ...children) {
  return el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": label }, ...children);
}

/** Make a section with a heading, at the end of the page. */
export function section(id, title, ...children) {
  const made = el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title`, tabindex: -1, text: title }),
    ...children,
  );
  document.getElementById("main").append(made);
  return made;
}

/** Make a labelled choice of [value, text] pairs. */
export function choice(label, options, value, change) {
  const select = el(
    "select",
    { on: { change: () => change(select.value) } },
    ...options.map(([key, text]) => el("option", { value: key, selected: key === value, text })),
  );
  return el("label", {}, `${label} `, select);
}

/** Make a labelled check box. */
export function check(label, checked, change) {
  const box = el("input", { type: "checkbox", checked, on: { change: () => change(box.checked) } });
  return el("label", {}, box, ` ${label}`);
}

export function button(text, click, attributes = {}) {
  return el("button", { type: "button", text, on: { click }, ...attributes });
}
