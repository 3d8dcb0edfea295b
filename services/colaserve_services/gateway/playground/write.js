// Write: a text that forms block by block. Each preview, and each block in the end, is a frame that can be looked at.
import { chunks, latentsOf } from "./api.js";
import { $, choose, el, heatMap, runs, sparkline } from "./dom.js";
import { keywords, literal, take } from "./export.js";
import { chosen } from "./settings.js";

const PATH = "v1/completions";
const DONE = Infinity; // the step of a block that is written
const section = $("#tool-write"), scrub = $("#scrub"), strip = $("#strip");
let run = null;

runs(section, async (signal) => {
  const body = {
    prompt: $("#prompt").value, ...chosen(), stream: true, preview_every: Number($("#every").value),
    with_probes: true, with_latents: true, stream_options: { include_usage: true },
  };
  const mine = (run = { body, frames: [], blocks: [], began: performance.now(), end: "" });
  $(".result", section).hidden = false;
  show(0);
  status("Waits for the first block.");
  try {
    for await (const chunk of chunks(PATH, body, signal)) receive(mine, chunk);
  } catch (problem) {
    if (run === mine) status(signal.aborted ? "Stopped." : "Broken off.");
    throw problem;
  } finally {
    if (run === mine && run.frames.length) exportRun();
  }
});

function receive(run, { choices: [choice], usage }) {
  if (usage) return ended(run, usage);
  if (!choice) return;
  const follows = Number(scrub.value) >= run.frames.length - 1;
  const { preview, probes = {} } = choice, { text, latents, step = DONE } = preview ?? choice;
  const frame = { block: run.blocks.length, step, text, probes, latents: latents && latentsOf(latents) };
  run.frames.push(frame);
  if (!preview) run.blocks.push(frame);
  run.end = choice.finish_reason ?? run.end;
  scrub.max = run.frames.length - 1;
  if (follows) show(run.frames.length - 1);
}

function ended(run, usage) {
  show(run.frames.indexOf(run.blocks.findLast(({ text }) => text) ?? run.blocks.at(-1)));
  const seconds = ((performance.now() - run.began) / 1000).toFixed(1);
  const why = run.end === "stop" ? "an end token" : "the budget";
  status(`${usage.completion_tokens} tokens in ${seconds} s, seed ${run.body.seed}; ended by ${why}.`);
}

const status = (text) => { $("[role=status]", section).textContent = text; };

function show(at) {
  scrub.value = at;
  const now = run.frames[at] ?? { block: 0, step: 0, text: "" };
  const done = run.blocks.slice(0, now.block).map(({ text }) => text).join("");
  const last = now.step === DONE;
  const coming = el("span", { class: last ? "" : "coming" }, now.text);
  $("#text").replaceChildren(el("span", { class: "given" }, run.body.prompt), done, coming);
  const name = `block ${now.block + 1}, ${last ? "done" : `step ${now.step}`}`;
  $("output", section).textContent = name;
  scrub.setAttribute("aria-valuetext", `${name}: ${now.text}`);
  showStrip(at, now.block);
  showProbes(at);
}

function showStrip(at, block) {
  const first = run.frames.findIndex((one) => one.block === block);
  const frames = run.frames.filter((one) => one.block === block);
  if (strip.children.length !== frames.length || strip.dataset.block !== String(block) || strip.run !== run) {
    strip.replaceChildren(...frames.map(({ step, text, latents }, i) => el("li", { onclick: () => show(first + i) },
      el("b", {}, step === DONE ? "done" : `step ${step}`), ...(latents ? [heatMap(latents)] : []), el("span", {}, text))));
    strip.dataset.block = block;
    strip.run = run;
  }
  choose(strip.children, at - first);
  const current = strip.children[at - first];
  if (current) strip.scrollLeft = current.offsetLeft - strip.offsetLeft - strip.clientWidth / 2;
}

const short = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3))));

function showProbes(frame) {
  const names = [...new Set(run.frames.flatMap(({ probes }) => Object.keys(probes)))];
  $("#probes").replaceChildren(...names.map((name) => {
    const known = run.frames.flatMap(({ probes }, i) => (name in probes ? [[i, probes[name]]] : []));
    const values = known.map(([, value]) => value), at = Math.max(known.findLastIndex(([i]) => i <= frame), 0);
    const said = name.replaceAll("_", " ");
    const label = `${said}: ${values.length} values from ${short(Math.min(...values))} to ${short(Math.max(...values))}`;
    return el("div", { class: "probe" }, el("span", {}, said), sparkline(values, at, label), el("b", {}, short(values[at])));
  }));
}

scrub.addEventListener("input", () => show(Number(scrub.value)));

function exportRun() {
  const { prompt, seed, preview_every: every, stream, stream_options: _, with_probes: __, with_latents: ___, ...settings } = run.body;
  const given = run.blocks.filter(({ latents }) => latents).map(({ latents }) => latents);
  take("write", {
    calls: [[PATH, run.body]],
    python: [`result = client.generate(${literal(prompt)}${keywords({ ...settings, seed })}, with_latents=True)`,
      "print(result.text)", 'result.latents.save("write.safetensors")'],
    tensors: given.length ? { latents: joined(given) } : {},
  });
}

function joined(parts) {
  const data = new Float32Array(parts.reduce((sum, { data }) => sum + data.length, 0));
  parts.reduce((at, part) => (data.set(part.data, at), at + part.data.length), 0);
  return { shape: [parts.reduce((sum, { shape }) => sum + shape[0], 0), parts[0].shape[1]], data };
}
