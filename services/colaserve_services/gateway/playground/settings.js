// The settings: their types, ranges and descriptions come from /openapi.json, the grey values from the served model.
import { $, el } from "./dom.js";

const NAMES = ["max_tokens", "steps", "guidance_scale", "solver", "temperature", "seed"];
const USING = ["write", "infill", "grid"];
const UNUSED = { infill: ["max_tokens"], grid: ["steps", "guidance_scale"] }; // by tool: it sets them itself
const LARGEST = 2 ** 53 - 1; // that a number of JavaScript keeps exactly
const form = $("#settings");
let tool = "";

export function show(openapi, defaults) {
  const { properties } = openapi.components.schemas.CompletionRequest;
  $("#fields").replaceChildren(...NAMES.map((name) => {
    const { description, anyOf: [kind] } = properties[name];
    const label = el("label", { for: name, title: description }, name.replaceAll("_", " "));
    return el("div", {}, label, kind.enum ? menu(name, kind.enum, defaults[name]) : number(name, kind, defaults[name]));
  }));
  offer(tool);
}

/** Shows the settings that a tool takes. */
export function offer(name) {
  tool = name;
  form.hidden = !USING.includes(tool);
  $("#fields").childNodes.forEach((field, i) => { field.hidden = UNUSED[tool]?.includes(NAMES[i]) ?? false; });
}

const menu = (name, values, own) => el("select", { id: name }, el("option", { value: "" }, `${own} (default)`),
  ...values.filter((value) => value !== own).map((value) => el("option", { value }, value)));

const number = (name, kind, own) => el("input", {
  id: name, type: "number", min: kind.minimum, max: Math.min(kind.maximum ?? LARGEST, LARGEST),
  step: kind.type === "integer" ? 1 : "any", placeholder: own ?? "random",
});

/** What was set, by the names of /v1/completions, with a seed in any case. Throws when a value is out of range. */
export function chosen() {
  const fields = NAMES.map((name) => $(`#${name}`)).filter((field) => field && !field.parentNode.hidden);
  const wrong = fields.find((field) => !field.checkValidity());
  if (wrong) {
    $("details", form).open = true;
    wrong.focus();
    throw new Error(`${wrong.id.replaceAll("_", " ")}: ${wrong.validationMessage}`);
  }
  const given = fields.filter(({ value }) => value !== "");
  const values = Object.fromEntries(given.map(({ id, value, type }) => [id, type === "number" ? Number(value) : value]));
  return { ...values, seed: values.seed ?? Math.floor(Math.random() * 1e6) };
}
