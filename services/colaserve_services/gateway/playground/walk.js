// Walk: the texts between two texts.
import { answer, latentsOf } from "./api.js";
import { $, choose, el, heatMap, runs } from "./dom.js";
import { literal, take } from "./export.js";

const PATH = "v1/latents/interpolate";
const section = $("#tool-walk"), way = $("#way");
let stops = [];

runs(section, async (signal) => {
  const [start, end, points] = [$("#from").value, $("#to").value, Number($("#points").value)];
  const body = { start: { text: start }, end: { text: end }, points };
  const found = await answer(PATH, body, signal);
  stops = found.points.map((point) => ({ ...point, latents: latentsOf(point.latents) }));
  $(".result", section).hidden = false;
  way.max = stops.length - 1;
  $("#stops").replaceChildren(...stops.map(({ weight, text }, i) => el("li", {},
    el("button", { type: "button", onclick: () => show(i), class: text === stops[i - 1]?.text && "same" },
      el("span", {}, weight.toFixed(2)), el("span", {}, text)))));
  show(0);
  take("walk", {
    calls: [[PATH, body]],
    python: [`for point in client.interpolate(${literal(start)}, ${literal(end)}, points=${points}):`,
      '    print(f"{point.weight:.2f} {point.text}")'],
    tensors: Object.fromEntries(stops.map(({ latents }, i) => [`point_${String(i).padStart(3, "0")}`, latents])),
  });
});

function show(at) {
  const { weight, text, latents } = stops[at];
  way.value = at;
  way.setAttribute("aria-valuetext", `${weight.toFixed(2)}: ${text}`);
  $("output", section).textContent = weight.toFixed(2);
  $("#there").textContent = text;
  const map = heatMap(latents, { "aria-label": "Latents of this point" });
  map.style.height = `${0.75 * latents.shape[0]}rem`;
  $("#there-map").replaceChildren(map);
  choose($("#stops").querySelectorAll("button"), at);
}

way.addEventListener("input", () => show(Number(way.value)));
