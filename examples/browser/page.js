/** The page: its fields, two buttons and a status line. */
import { Model } from "./model.js";

const [form, file, prompt, temperature, seed, tokens, generate, stop, status, prompted, generated] = [
  "form", "file", "prompt", "temperature", "seed", "tokens", "generate", "stop", "status", "prompted", "generated",
].map((id) => document.getElementById(id));

let model;
let current = 0; // number of the current text; generation of older ones stops

function say(text) {
  status.textContent = text;
}

async function load(name, bytes) {
  current += 1;
  generate.disabled = true;
  say(`Opening ${name} …`);
  try {
    model = await Model.open(new Uint8Array(await bytes));
    generate.disabled = false;
    say(`${name} is open.`);
  } catch (error) {
    say(`${name}: ${error.message}`);
  }
}

async function show() {
  const mine = ++current;
  const began = performance.now();
  let shown = began;
  stop.disabled = false;
  generated.textContent = "";
  prompted.textContent = prompt.value;
  try {
    const settings = [tokens, temperature, seed].map((field) => field.valueAsNumber);
    for await (const ids of model.generate(prompt.value, ...settings)) {
      if (mine !== current) return;
      generated.textContent = model.decode(ids);
      const now = performance.now();
      say(`${ids.length} tokens, ${Math.round((1000 * ids.length) / (now - began))} per second`);
      if (now - shown > 30) {
        await new Promise((next) => setTimeout(next)); // let the browser draw the page and handle clicks
        shown = performance.now();
      }
    }
    say(`Done: ${status.textContent}`);
  } catch (error) {
    say(error.message);
  } finally {
    if (mine === current) stop.disabled = true;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show();
});
stop.addEventListener("click", () => {
  current += 1;
  stop.disabled = true;
});
file.addEventListener("change", () => {
  if (file.files[0]) load(file.files[0].name, file.files[0].arrayBuffer());
});

// model.onnx next to this page, or the file given as ?model=
const name = new URLSearchParams(location.search).get("model") ?? "model.onnx";
const answer = await fetch(name);
if (answer.ok) await load(name, answer.arrayBuffer());
else say(`There is no ${name} next to this page: choose a file.`);
