// Opens the page: the served model, its settings, and the tool that the address names.
import { answer } from "./api.js";
import { $, el } from "./dom.js";
import { showExport, theModel } from "./export.js";
import { offer, show as showSettings } from "./settings.js";
import "./write.js";
import "./latents.js";
import "./walk.js";
import "./infill.js";
import "./grid.js";

const links = [...document.querySelectorAll("nav a[href^='#']")];

function open() {
  const name = links.map((link) => link.hash.slice(1)).find((tool) => `#${tool}` === location.hash) ?? "write";
  for (const link of links) {
    const current = link.hash === `#${name}`;
    $(`#tool-${link.hash.slice(1)}`).hidden = !current;
    current ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  offer(name);
  $("main").classList.toggle("alone", $("#settings").hidden);
  showExport(name);
}

async function load() {
  try {
    const [openapi, models] = await Promise.all([answer("openapi.json"), answer("v1/models")]);
    const [model] = models.data;
    $("#model").textContent = `serves ${model.id}`;
    $("#about").textContent = model.description;
    theModel(model);
    showSettings(openapi, model.defaults);
    document.body.setAttribute("data-ready", "");
  } catch (problem) {
    const again = el("button", { type: "button", onclick: () => { said.remove(); load(); } }, "Try again");
    const said = el("p", { class: "error", role: "alert" }, problem.message, " ", again);
    $("header").append(said);
  }
}

$("#settings details").open = matchMedia("(min-width: 50rem)").matches;
addEventListener("hashchange", open);
open();
load();
