// Infill: a text with holes, written as [[tokens]], as the command line has them.
import { answer } from "./api.js";
import { $, el, runs } from "./dom.js";
import { keywords, literal, take } from "./export.js";
import { chosen } from "./settings.js";

const PATH = "v1/latents/infill";
const section = $("#tool-infill"), editor = $("#holes");

runs(section, async (signal) => {
  const parts = editor.value.split(/\[\[(\d+)\]\]/);
  if (parts.length === 1) throw new Error("The text has no hole; [[2]] is one of two tokens.");
  const segments = parts.map((part, i) => (i % 2 ? Number(part) : part)).filter((part) => part !== "");
  const { temperature, seed, ...sampler } = chosen();
  const body = {
    segments: segments.map((part) => (typeof part === "string" ? { text: part } : { token_count: part })),
    sampler, sampling: { temperature }, seed,
  };
  const found = await answer(PATH, body, signal);
  $(".result", section).hidden = false;
  $("#filled").replaceChildren(...found.segments.map((text, i) => (typeof segments[i] === "string" ? text : el("mark", {}, text))));
  const settings = keywords({ ...sampler, temperature, seed });
  take("infill", { calls: [[PATH, body]], python: [`print(client.infill(${literal(segments)}${settings}).text)`] });
});

$("#cut").addEventListener("click", async () => {
  const { value, selectionStart: from, selectionEnd: to } = editor;
  const error = $(".error", section);
  error.textContent = "";
  try {
    const count = from === to ? 1 : (await answer("tokenize", { prompt: value.slice(from, to) })).count;
    editor.setRangeText(`[[${count}]]`, from, to, "end");
    editor.focus();
  } catch (problem) {
    error.textContent = problem.message;
  }
});
