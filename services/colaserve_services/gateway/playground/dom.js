// Elements and drawings. Text is only ever set as text, so nothing that a model or a user writes becomes markup.

export const $ = (selector, within = document) => within.querySelector(selector);

const filled = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};
export const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** Marks one of `nodes` as the current one. */
export function choose(nodes, index) {
  [...nodes].forEach((node, i) => (i === index ? node.setAttribute("aria-current", "true") : node.removeAttribute("aria-current")));
}

/** A heat map of latents, a pixel a number: orange above zero, blue below, clear at zero, full colour from 2.5 on. */
export function heatMap({ shape: [rows, columns], data }, attributes = {}) {
  const canvas = el("canvas", { width: columns, height: rows, role: "img", "aria-label": "Heat map of latents", ...attributes });
  const brush = canvas.getContext("2d");
  const root = getComputedStyle(document.documentElement);
  const [high, low] = ["--high", "--low"].map((name) => root.getPropertyValue(name));
  data.forEach((value, i) => {
    brush.fillStyle = `rgba(${value > 0 ? high : low}, ${Math.min(Math.abs(value) / 2.5, 1)})`;
    brush.fillRect(i % columns, Math.floor(i / columns), 1, 1);
  });
  return canvas;
}

/** A line through `values`, with a dot at `at`. */
export function sparkline(values, at, label) {
  const low = Math.min(...values), span = Math.max(...values) - low || 1, width = 100, height = 24;
  const x = (i) => (values.length > 1 ? (i / (values.length - 1)) * (width - 8) + 4 : width / 2);
  const y = (value) => height - 4 - ((value - low) / span) * (height - 8);
  const line = svg("polyline", { points: values.map((value, i) => `${x(i)},${y(value)}`).join(" ") });
  const dot = svg("circle", { cx: x(at), cy: y(values[at]), r: 3 });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, line, dot);
}

/** Lets a form run `work(signal)`, one run at a time: errors are shown, and its stop button ends it. */
export function runs(section, work) {
  const form = $("form", section), stop = $(".stop", form), error = $(".error", section);
  let running = null;
  stop?.addEventListener("click", () => running?.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const mine = (running = new AbortController());
    error.textContent = "";
    section.setAttribute("aria-busy", "true");
    if (stop) stop.hidden = false;
    try {
      await work(mine.signal);
    } catch (problem) {
      if (!mine.signal.aborted) error.textContent = problem.message;
    }
    if (running !== mine) return;
    section.removeAttribute("aria-busy");
    if (stop) stop.hidden = true;
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}
