// Latents: sentences as points of a plane, and one of them as a heat map.
import { answer, latentsOf } from "./api.js";
import { $, choose, el, heatMap, runs, svg } from "./dom.js";
import { literal, take } from "./export.js";

const PATH = "v1/latents/encode";
const WIDTH = 400, HEIGHT = 300, MARGIN = 22;
const section = $("#tool-latents");

runs(section, async (signal) => {
  const texts = $("#sentences").value.split("\n").filter((line) => line.trim());
  if (!texts.length) throw new Error("Write at least one sentence.");
  const body = { texts };
  const { encodings } = await answer(PATH, body, signal);
  const found = encodings.map(({ latents, tokens }, i) => ({ text: texts[i], tokens, latents: latentsOf(latents) }));
  $(".result", section).hidden = false;
  showMap(found);
  showHeat(found, 0);
  take("latents", {
    calls: [[PATH, body]],
    python: [`texts = ${literal(texts)}`, "for text, encoding in zip(texts, client.encode_text(texts)):",
      "    print(text, encoding.latents.shape, encoding.latents.numpy().mean(axis=0))"],
    tensors: Object.fromEntries(found.map(({ latents }, i) => [`text_${String(i).padStart(3, "0")}`, latents])),
  });
});

function mean({ shape: [rows, columns], data }) {
  return Array.from({ length: columns }, (_, column) => {
    let sum = 0;
    for (let row = 0; row < rows; row++) sum += data[row * columns + column];
    return sum / rows;
  });
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/** The first two principal components of points: coordinates, and shares of the variance. */
export function components(points) {
  const centre = points[0].map((_, i) => points.reduce((sum, point) => sum + point[i], 0) / points.length);
  let left = points.map((point) => point.map((value, i) => value - centre[i]));
  const total = left.reduce((sum, point) => sum + dot(point, point), 0) || 1;
  return [0, 1].map(() => {
    let axis = left.reduce((most, point) => (dot(point, point) > dot(most, most) ? point : most));
    for (let round = 0; round < 300; round++) { // power iteration: axis <- X' X axis, at length 1
      const next = axis.map(() => 0);
      for (const point of left) {
        const along = dot(point, axis);
        point.forEach((value, i) => { next[i] += along * value; });
      }
      const length = Math.sqrt(dot(next, next));
      if (length < 1e-12) break;
      axis = next.map((value) => value / length);
    }
    const unit = Math.sqrt(dot(axis, axis)) || 1;
    axis = axis.map((value) => value / unit);
    const places = left.map((point) => dot(point, axis));
    left = left.map((point, i) => point.map((value, j) => value - places[i] * axis[j]));
    return { places, share: dot(places, places) / total };
  });
}

function showMap(found) {
  const axes = components(found.map(({ latents }) => mean(latents)));
  const [x, y] = axes.map(({ places }, i) => {
    const low = Math.min(...places), span = Math.max(...places) - low || 1, length = i ? HEIGHT : WIDTH;
    return places.map((place) => MARGIN + ((place - low) / span) * (length - 2 * MARGIN));
  });
  const pick = (i) => () => showHeat(found, i);
  const dots = found.map(({ text }, i) => svg("g", { onclick: pick(i), transform: `translate(${x[i]} ${y[i]})` },
    svg("title", {}, text), svg("circle", { r: 11 }), svg("text", {}, String(i + 1))));
  const [first, second] = axes.map(({ share }) => `${Math.round(100 * share)} %`);
  $("#shares").textContent = `${first} of the variance to the right, ${second} down`;
  $("#map").replaceChildren(svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Map of the sentences" }, ...dots));
  $("#list").replaceChildren(...found.map(({ text }, i) =>
    el("li", {}, el("button", { type: "button", onclick: pick(i) }, `${i + 1}  ${text}`))));
}

function showHeat(found, chosen) {
  const { text, tokens, latents } = found[chosen], [rows, columns] = latents.shape;
  choose($("#map").querySelectorAll("g"), chosen);
  choose($("#list").querySelectorAll("button"), chosen);
  $("#heat-title").textContent = `Positions and channels of “${text}”`;
  const place = { row: 0, column: 0 };
  const read = () => {
    const value = latents.data[place.row * columns + place.column].toFixed(3);
    $("#reading").textContent = `position ${place.row}, channel ${place.column}: ${value}`;
  };
  const move = (row, column) => {
    place.row = Math.min(Math.max(row, 0), rows - 1);
    place.column = Math.min(Math.max(column, 0), columns - 1);
    read();
  };
  const keys = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const canvas = heatMap(latents, {
    tabindex: 0, "aria-label": `Latents of ${text}: ${rows} positions, ${columns} channels`, "aria-describedby": "reading",
    onpointermove: ({ offsetX, offsetY }) =>
      move(Math.floor((offsetY / canvas.clientHeight) * rows), Math.floor((offsetX / canvas.clientWidth) * columns)),
    onkeydown: (event) => {
      const step = keys[event.key];
      if (!step) return;
      event.preventDefault();
      move(place.row + step[0], place.column + step[1]);
    },
  });
  const each = Math.ceil(tokens.length / rows); // tokens a latent
  const names = Array.from({ length: rows }, (_, i) => tokens.slice(i * each, (i + 1) * each).join(""));
  canvas.style.height = `${1.5 * rows}rem`;
  $("#heat").replaceChildren(el("ol", {}, ...names.map((name) => el("li", {}, name))), canvas);
  read();
}
