// The results on screen as curl lines, as lines of Python, and as a safetensors file.
import { hasKey } from "./api.js";
import { $, el } from "./dom.js";

const takings = {}; // tool: {calls: [[path, body]], python: [line], tensors: {name: {shape, data}}}
let shown = "write", space = "";

export const theModel = (model) => { space = model.space; };

/** Keeps what a tool shows, for the panel below it. */
export function take(tool, taking) {
  takings[tool] = taking;
  if (tool === shown) showExport(tool);
}

export function showExport(tool) {
  shown = tool;
  const taking = takings[tool];
  $("#export").hidden = !taking;
  if (!taking) return;
  $("#curl").textContent = taking.calls.map(([path, body]) => curl(path, body)).join("\n");
  $("#python").textContent = python(taking.python);
  $("#save").hidden = !Object.keys(taking.tensors ?? {}).length;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(path, body) {
  const key = hasKey() ? ' -H "authorization: Bearer $COLASERVE_KEY"' : "";
  const url = quoted(new URL(path, location.href).href);
  return `curl -N ${url}${key} -H 'content-type: application/json' -d ${quoted(JSON.stringify(body))}`;
}

function python(lines) {
  const key = hasKey() ? ', key=os.environ["COLASERVE_KEY"]' : "";
  return [...(key ? ["import os"] : []), "from colaserve_client import Client", "",
    `with Client("${location.hostname}:50051"${key}) as client:  # the port of gRPC`, ...lines.map((line) => `    ${line}`)].join("\n");
}

/** A value as Python writes it; strings of JSON are strings of Python. */
export function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  return typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
}

/** Settings as keywords of the client's methods. */
export const keywords = ({ max_tokens: most, ...settings }) =>
  Object.entries({ max_new_tokens: most, ...settings }).filter(([, value]) => value !== undefined)
    .map(([name, value]) => `, ${name}=${literal(value)}`).join("");

/** A safetensors file: the header's length, the header, the numbers. */
export function safetensors(tensors) {
  const header = { __metadata__: { format: "colaserve.latents.v1", space } };
  let end = 0;
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype: "F32", shape, data_offsets: [end, (end += data.byteLength)] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new DataView(new ArrayBuffer(8));
  length.setBigUint64(0, BigInt(text.length), true);
  return new Blob([length.buffer, text, ...Object.values(tensors).map(({ data }) => data)]);
}

$("#save").addEventListener("click", () => {
  const link = el("a", { href: URL.createObjectURL(safetensors(takings[shown].tensors)), download: `${shown}.safetensors` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const from = $(`#${button.dataset.copy}`), said = $("#export [role=status]");
    getSelection().selectAllChildren(from);
    try {
      await navigator.clipboard.writeText(from.textContent);
      said.textContent = "Copied.";
    } catch { // a page without TLS from another machine has no clipboard
      said.textContent = "Selected: copy it with the keyboard.";
    }
  });
}
