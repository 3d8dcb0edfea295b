// Grid: one prompt over guidance and steps, with one seed, so that the cells differ by these two alone.
import { answer } from "./api.js";
import { $, el, runs } from "./dom.js";
import { keywords, literal, take } from "./export.js";
import { chosen } from "./settings.js";

const PATH = "v1/completions", MOST = 100, AT_ONCE = 4;
const section = $("#tool-grid");

runs(section, async (signal) => {
  const prompt = $("#question").value, settings = chosen();
  const [scales, counts] = [numbers("#scales"), numbers("#counts")];
  if (scales.length * counts.length > MOST) throw new Error(`The table has at most ${MOST} cells.`);
  const cells = counts.flatMap((steps) => scales.map((scale) =>
    ({ node: el("td", {}, "…"), body: { prompt, ...settings, steps, guidance_scale: scale } })));
  show(scales, counts, cells);
  take("grid", exported(prompt, settings, scales, counts, cells));
  const left = cells.values();
  await Promise.all(Array.from({ length: AT_ONCE }, async () => {
    for (const { node, body } of left) {
      const began = performance.now();
      const { choices: [{ text }] } = await answer(PATH, body, signal);
      const seconds = ((performance.now() - began) / 1000).toFixed(2);
      node.replaceChildren(text || "(nothing)", el("small", {}, `${seconds} s`));
    }
  }));
});

function numbers(id) {
  const field = $(id), found = field.value.split(/[\s,;]+/).filter(Boolean).map(Number);
  if (found.length && found.every(Number.isFinite)) return found;
  field.focus();
  throw new Error(`${field.labels[0].textContent}: write numbers with commas between them.`);
}

function show(scales, counts, cells) {
  const head = el("tr", {}, el("th", { scope: "col" }, "Steps"), ...scales.map((scale) => el("th", { scope: "col" }, `Guidance ${scale}`)));
  const rows = counts.map((steps, row) => el("tr", {}, el("th", { scope: "row" }, String(steps)),
    ...cells.slice(row * scales.length, (row + 1) * scales.length).map(({ node }) => node)));
  const result = $(".result", section);
  result.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  result.hidden = false;
}

function exported(prompt, settings, scales, counts, cells) {
  return {
    calls: cells.map(({ body }) => [PATH, body]),
    python: [`for steps in ${literal(counts)}:`, `    for scale in ${literal(scales)}:`,
      `        result = client.generate(${literal(prompt)}${keywords(settings)}, steps=steps, guidance_scale=scale)`,
      "        print(steps, scale, result.text)"],
  };
}
