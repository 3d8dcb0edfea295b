// Calls of the gateway. A key is asked for when one is needed, and kept in this variable alone.
import { $ } from "./dom.js";

let key = "";
let asking = null;

export const hasKey = () => key !== "";

function ask(why) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("#ask");
    $(".error", dialog).textContent = why;
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      key = $("#key").value.trim();
      if (dialog.returnValue) resolve();
      else reject(new Error("This server needs a key."));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function call(path, body, signal) {
  for (;;) {
    const headers = body === undefined ? {} : { "content-type": "application/json" };
    const shown = key;
    if (key) headers.authorization = `Bearer ${key}`;
    const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await reason(response));
    if (shown === key) await ask(shown && "The server does not know this key.");
    signal?.throwIfAborted();
  }
}

async function reason(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}: ${text.slice(0, 200)}`;
  }
}

/** The JSON answer of GET, or with a body of POST. */
export const answer = async (path, body, signal) => (await call(path, body, signal)).json();

/** The chunks of a stream of server-sent events, until [DONE]; `body` asks for a stream. */
export async function* chunks(path, body, signal) {
  const reader = (await call(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke before the text was complete.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

/** Latents as the gateway sends them, base64 of little-endian float32, as {shape, data}. */
export function latentsOf({ shape, data }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return { shape, data: new Float32Array(bytes.buffer) };
}
