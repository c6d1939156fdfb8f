/** The page: its fields, its two buttons, and one line that says what is going on. The model is in verse.js. */
import { Model } from "./verse.js";

const [form, file, prompt, temperature, seed, tokens, write, stop, status, prompted, written] = [
  "form", "file", "prompt", "temperature", "seed", "tokens", "write", "stop", "status", "prompted", "written",
].map((id) => document.getElementById(id));

let model;
let wanted = 0; // the text that is wanted: one that finds itself no longer wanted ends

function say(text) {
  status.textContent = text;
}

async function load(name, bytes) {
  wanted += 1;
  write.disabled = true;
  say(`Opening ${name} …`);
  try {
    model = await Model.open(new Uint8Array(await bytes));
    write.disabled = false;
    say(`${name} is open.`);
  } catch (error) {
    say(`${name}: ${error.message}`);
  }
}

async function show() {
  const mine = ++wanted;
  const began = performance.now();
  let shown = began;
  stop.disabled = false;
  written.textContent = "";
  prompted.textContent = prompt.value;
  try {
    for await (const ids of model.write(prompt.value, tokens.valueAsNumber, temperature.valueAsNumber, seed.valueAsNumber)) {
      if (mine !== wanted) return;
      written.textContent = model.decode(ids);
      const now = performance.now();
      say(`${ids.length} tokens, ${Math.round((1000 * ids.length) / (now - began))} a second`);
      if (now - shown > 30) {
        await new Promise((next) => setTimeout(next)); // the page is drawn, and clicks are heard
        shown = performance.now();
      }
    }
    say(`Done: ${status.textContent}`);
  } catch (error) {
    say(error.message);
  } finally {
    if (mine === wanted) stop.disabled = true;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show();
});
stop.addEventListener("click", () => {
  wanted += 1;
  stop.disabled = true;
});
file.addEventListener("change", () => {
  if (file.files[0]) load(file.files[0].name, file.files[0].arrayBuffer());
});

// the file that lies beside this page, or where ?model= says
const name = new URLSearchParams(location.search).get("model") ?? "verse.onnx";
const answer = await fetch(name);
if (answer.ok) await load(name, answer.arrayBuffer());
else say(`There is no ${name} beside this page: choose a file.`);
