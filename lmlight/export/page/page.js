/**
 * The page: connects its elements with a model.
 *
 * The text is `tokens`: for each its id, its text, and the logits that predicted it. Editing the text scores it anew; generating
 * appends to it.
 */
import { Model, Stream, draw, largest, probabilities, randomNumbers, startEngine, surprise } from "./model.js";

const RED = 8; // nats of the strongest colour
const KEPT_LOGITS = 2 ** 26; // numbers: 256 MB
const LINE_END = /(?<=[^:\s])\r?\n/; // where lmlight ends a text with `end_at_line`

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const sliders = ["temperature", "top_k", "top_p", "min_p"];

let info; // model.json
let model;
let tokens = [];
let next = null; // the logits of the next token
let selected = -1;
let pinned = -1; // selected by a click or a key, not by hovering
let version = 0; // of the text; work on an older one stops
let generation = null; // what continues the text: its stream, prompt, ids and random numbers; null after an edit
let reading = null; // the promise of the scoring in progress
let editing = 0; // the timer of an edit that is not read yet
const exact = {}; // settings of the model between two positions of a slider, until it is moved
let problem = ""; // why the text cannot be read
let stopping = false;

// ---- scoring ----

/** Encodes and scores the text in the box. */
async function read() {
  const mine = ++version;
  generation = null;
  let ids;
  try {
    ids = model.encode(page.text.value);
    problem = "";
  } catch (error) {
    ids = [];
    problem = error.message;
  }
  const old = tokens;
  tokens = ids.map((id, at) => (old[at]?.id === id ? { ...old[at], nats: undefined } : { id, text: model.label(id) }));
  pinned = -1;
  select(-1);
  next = null;
  try {
    let at = 1; // nothing is before the first token
    for await (const logits of model.score(ids)) {
      if (mine !== version) return;
      if (at < ids.length) score(at, logits);
      at += 1;
      if (at % model.window === 0) await drawn();
    }
    // with a whole block of context
    next = !problem && (ids.length || model.bos_id !== null) ? await new Stream(model, ids).next() : null;
  } catch (error) {
    problem = error.message;
  }
  if (mine !== version) return;
  say(problem || "Ready.");
  show();
}

/** Reads what has been typed until now. */
function readTyped() {
  clearTimeout(editing);
  if (editing) reading = read();
  editing = 0;
  return reading;
}

/** Records the logits that predicted a token. The first one is not scored: nothing is before it. */
function score(at, logits) {
  if (at > 0) tokens[at].nats = surprise(logits, tokens[at].id);
  tokens[at].logits = logits;
  const forgotten = at - Math.floor(KEPT_LOGITS / model.vocab_size);
  if (forgotten >= 0) tokens[forgotten].logits = undefined;
}

/** The logits that predicted a token; recomputed if they were forgotten. */
async function logitsAt(at) {
  if (!tokens[at].logits && at > 0) {
    const before = tokens.slice(Math.max(0, at - model.window), at).map(({ id }) => id);
    const { logits } = await model.run(before, model.emptyPast(), ["logits"]);
    return logits.data.slice(-model.vocab_size);
  }
  return tokens[at].logits;
}

// ---- generating ----

function settings() {
  return Object.fromEntries(sliders.map((id) => [id, exact[id] ?? page[id].valueAsNumber]));
}

/** Appends up to `most` tokens. */
async function generate(most) {
  setBusy(true);
  await readTyped();
  let ending = problem;
  let end = -1;
  try {
    if (problem) return;
    if (!generation) {
      const stream = new Stream(model, tokens.map(({ id }) => id));
      generation = { stream, prompt: page.text.value, ids: [], random: randomNumbers(page.seed.valueAsNumber) };
      next = await stream.next();
    }
    const { stream, prompt, ids, random } = generation;
    let text = model.decode(ids);
    let count = 0;
    ending = "Done";
    const began = performance.now();
    for (let drawnAt = began; count < most && end < 0; count++) {
      if (stopping) {
        ending = "Stopped";
        break;
      }
      const id = draw(probabilities(next, settings()), random());
      if (id === model.eos_id) {
        ending = "Done, the document ends here";
        break;
      }
      stream.push(id);
      ids.push(id);
      tokens.push({ id, text: model.label(id) });
      score(tokens.length - 1, next);
      next = await stream.next();
      const [before, now] = [text.length, performance.now()];
      const isDue = now - drawnAt > 30;
      const mayEnd = info.sampling.end_at_line && count >= Math.ceil(0.8 * most);
      if (isDue || mayEnd) text = model.decode(ids);
      if (mayEnd) end = endOfLine(text, before);
      if (isDue && end < 0) {
        write(prompt + text);
        say(speed(count + 1, now - began));
        await drawn();
        drawnAt = performance.now();
      }
    }
    if (end >= 0) ending = "Done, at a line's end";
    ending = `${ending}: ${speed(count, performance.now() - began)}`;
    text = model.decode(ids);
    if (end >= 0) generation = null;
    while (end >= 0 && text.length > end) {
      ids.pop();
      next = tokens.pop().logits; // what the removed token was drawn from
      text = model.decode(ids);
    }
    write(prompt + text);
  } catch (error) {
    ending = error.message;
  } finally {
    setBusy(false);
    say(ending);
  }
}

/** Where lmlight would end the text, with its option `end_at_line`, in what is new from `before` on; -1 if it goes on. */
function endOfLine(text, before) {
  const from = Math.max(0, before - 1);
  const at = text.slice(from).search(LINE_END);
  return at < 0 ? -1 : from + at;
}

/** Shows a text that is being generated. */
function write(text) {
  page.text.value = text.replace(/\ufffd+$/, ""); // bytes of a character to come
  page.text.scrollTop = page.text.scrollHeight;
  showTokens();
  page.view.scrollTop = page.view.scrollHeight;
  showBars(page["next-bars"], next);
}

function counted(count) {
  return `${count} token${count === 1 ? "" : "s"}`;
}

function speed(count, milliseconds) {
  return counted(count) + (count > 1 ? `, ${Math.round((1000 * count) / Math.max(1, milliseconds))} per second` : "");
}

function setBusy(busy) {
  stopping = false;
  const focused = document.activeElement;
  page.text.readOnly = busy;
  page.status.ariaLive = busy ? "off" : "polite"; // the end is announced, not each token
  page.generate.disabled = page.one.disabled = page.seed.disabled = busy;
  page.stop.disabled = !busy;
  // a disabled element loses the focus
  if (busy && [page.generate, page.one].includes(focused)) {
    page.stop.focus();
    page.stop.returnsTo = focused;
  } else if (!busy && page.stop.returnsTo) {
    if ([page.stop, document.body].includes(focused)) page.stop.returnsTo.focus();
    page.stop.returnsTo = undefined;
  }
  if (!busy) show();
}

function say(text) {
  page.status.textContent = text;
}

/** Lets the browser draw the page and handle clicks. */
function drawn() {
  return new Promise((done) => setTimeout(done));
}

// ---- showing ----

function show() {
  showTokens();
  showBars(page["next-bars"], next);
  showSelected();
}

function showTokens() {
  const chips = page.chips;
  while (chips.children.length - 1 > tokens.length) chips.lastChild.remove();
  let total = 0;
  tokens.forEach((token, at) => {
    let chip = chips.children[at + 1]; // the first child is the drawing of lines
    if (!chip) {
      chip = chips.appendChild(document.createElement("span"));
      chip.className = "chip";
      chip.setAttribute("role", "option");
      chip.id = `token-${at}`;
    }
    if (chip.shown !== token.text) {
      chip.replaceChildren(...visible(token.text));
      chip.shown = token.text;
    }
    if (chip.nats !== token.nats) {
      chip.nats = token.nats;
      chip.classList.toggle("unscored", token.nats === undefined);
      chip.style.setProperty("--surprise", Math.min(1, (token.nats ?? 0) / RED).toFixed(3));
    }
    total += token.nats ?? 0;
  });
  const scored = tokens.length ? [...page.text.value].length - [...model.decode([tokens[0].id])].length : 0;
  page.total.textContent = tokens.length
    ? `${counted(tokens.length)}, ${total.toFixed(4)} nats` +
      (scored > 0 ? `, ${(total / scored).toFixed(4)} nats per character, without the first token` : "")
    : "\u00a0";
}

/** A text with symbols for line breaks and for spaces at its end, or at its start, too. */
function visible(text, start = false) {
  return text.split(start ? /(\n|\t|^ +| +$)/ : /(\n|\t| +$)/).filter(Boolean).map((part) => {
    if (!/^\s+$/.test(part)) return part;
    const symbol = document.createElement("span");
    symbol.className = "symbol";
    symbol.textContent = part.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t").replaceAll(" ", "␣");
    return symbol;
  });
}

/** The likeliest tokens with their probabilities before and after the settings; `actual` is the token of the text. */
function showBars(list, logits, actual) {
  const rows = [];
  if (logits) {
    const [before, after] = [probabilities(logits), probabilities(logits, settings())];
    const ids = largest(before, 10);
    if (actual !== undefined && !ids.includes(actual)) ids[9] = actual;
    for (const id of ids) {
      const row = document.createElement("li");
      row.classList.toggle("actual", id === actual);
      row.classList.toggle("removed", after[id] === 0);
      row.dataset.id = id;
      row.dataset.before = before[id];
      row.dataset.after = after[id];
      const name = document.createElement("code");
      name.append(...visible(model.label(id), true));
      const track = document.createElement("span");
      track.className = "track";
      for (const kind of ["after", "before"]) {
        const bar = track.appendChild(document.createElement("i"));
        bar.className = kind;
        bar.style.setProperty(`--${kind}`, kind === "after" ? after[id] : before[id]);
      }
      row.append(name, track, percent("value", after[id]), percent("value muted", before[id]));
      rows.push(row);
    }
  }
  list.replaceChildren(...rows);
}

function percent(className, probability) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = `${(100 * probability).toFixed(1)}%`;
  return element;
}

// ---- selecting ----

function select(at) {
  selected = at;
  showSelected();
}

/** Selects a token until it is chosen again, whatever the mouse moves over. */
function pin(at) {
  pinned = at === pinned ? -1 : at;
  select(pinned);
}

async function showSelected() {
  const at = selected;
  const token = tokens[at];
  [...page.chips.querySelectorAll('[aria-selected="true"]')].forEach((chip) => chip.setAttribute("aria-selected", false));
  if (token) page.chips.children[at + 1]?.setAttribute("aria-selected", true);
  if (token) page.view.setAttribute("aria-activedescendant", `token-${at}`);
  else page.view.removeAttribute("aria-activedescendant");
  const title = page["instead-title"];
  if (!token) {
    title.textContent = "Selected token";
    showBars(page["instead-bars"]);
  } else {
    const nats = token.nats === undefined ? "the first token is not scored" : `${token.nats.toFixed(4)} nats`;
    title.textContent = `“${token.text.replaceAll("\n", "↵")}”: ${nats}`;
    const logits = await logitsAt(at);
    if (at === selected) showBars(page["instead-bars"], logits, token.id);
  }
  if (model.hasAttention) await showAttention();
}

// ---- attention ----

let attention; // of the window with the selected token

async function showAttention() {
  const at = selected < 0 ? tokens.length - 1 : selected;
  const start = Math.max(0, Math.min(at - (model.window >> 1), tokens.length - model.window));
  const ids = tokens.slice(start, start + model.window).map(({ id }) => id);
  const key = `${start}:${ids}`;
  if (!ids.length) {
    attention = undefined;
  } else if (attention?.key !== key) {
    const found = await model.attention(ids);
    attention = { key, start, ...found };
  }
  drawMap();
  drawLines();
}

/** The weights (queries, keys) of the chosen layer and head, or the mean of its heads. */
function chosenWeights() {
  const { weights, heads, queries, keys } = attention;
  const choice = `${page.layer.value} ${page.head.value}`;
  if (attention.choice === choice) return attention.chosen;
  const size = queries * keys;
  const first = Number(page.layer.value) * heads;
  const chosen = new Float32Array(size);
  const several = page.head.value === "mean" ? [...Array(heads).keys()] : [Number(page.head.value)];
  for (const head of several) {
    const from = (first + head) * size;
    for (let at = 0; at < size; at++) chosen[at] += weights[from + at] / several.length;
  }
  Object.assign(attention, { choice, chosen });
  return chosen;
}

function weight(query, key) {
  return chosenWeights()[query * attention.keys + key];
}

function drawMap() {
  const canvas = page.map;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!attention) return;
  const { queries, keys } = attention;
  const [red, green, blue] = getComputedStyle(page.generate).backgroundColor.match(/[\d.]+/g).map(Number);
  const image = new ImageData(keys, queries);
  chosenWeights().forEach((one, at) => {
    image.data.set([red, green, blue, 255 * Math.sqrt(one)], 4 * at); // small weights stay visible
  });
  const small = new OffscreenCanvas(keys, queries);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  const row = selected - attention.start;
  if (selected >= 0 && row >= 0 && row < queries) {
    const size = canvas.width / queries;
    context.strokeStyle = getComputedStyle(document.body).color;
    context.lineWidth = 2;
    context.strokeRect(0, row * size, (row + 1) * size, size);
  }
}

function drawLines() {
  const lines = page.lines;
  lines.replaceChildren();
  if (!attention || selected < 0) return;
  const query = selected - attention.start;
  if (query < 0 || query >= attention.queries) return;
  const origin = page.chips.getBoundingClientRect();
  const middle = (at) => {
    const box = page.chips.children[at + 1].getClientRects()[0];
    return [box.left - origin.left + box.width / 2, box.top - origin.top];
  };
  const [toX, toY] = middle(selected);
  for (let key = 0; key <= query; key++) {
    const strength = weight(query, key);
    if (strength < 0.01) continue;
    const [x, y] = middle(attention.start + key);
    const path = lines.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
    path.setAttribute("d", `M ${toX} ${toY} Q ${(x + toX) / 2} ${Math.min(y, toY) - 14 - Math.abs(x - toX) / 8} ${x} ${y}`);
    path.setAttribute("opacity", Math.sqrt(strength).toFixed(3));
    path.dataset.key = attention.start + key;
    path.dataset.weight = strength;
  }
}

// ---- events ----

page.text.addEventListener("input", () => {
  version += 1; // stops the scoring of the old text
  clearTimeout(editing);
  editing = setTimeout(readTyped, 150);
});
page.generate.addEventListener("click", () => generate(page.tokens.valueAsNumber));
page.one.addEventListener("click", () => generate(1));
page.stop.addEventListener("click", () => (stopping = true));
page.seed.addEventListener("change", () => (generation = null));
for (const field of [page.seed, page.tokens]) {
  field.addEventListener("change", () => {
    const value = Math.round(field.valueAsNumber || 0);
    field.value = Math.min(Number(field.max), Math.max(Number(field.min), value));
  });
}
page.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !page.generate.disabled) page.generate.click();
});

for (const id of sliders) {
  const slider = page[id];
  const output = document.querySelector(`output[for="${id}"]`);
  slider.addEventListener("input", (event) => {
    if (event.isTrusted || event.bubbles) delete exact[id];
    output.textContent = slider.dataset.off === slider.value && exact[id] === undefined ? "off" : exact[id] ?? slider.value;
    slider.ariaValueText = output.textContent;
    if (!model) return;
    showBars(page["next-bars"], next);
    const token = tokens[selected];
    if (token) logitsAt(selected).then((logits) => showBars(page["instead-bars"], logits, token.id));
  });
}

const chipAt = (target) => Number(target.closest?.(".chip")?.id.slice("token-".length) ?? -1);
page.view.addEventListener("click", (event) => pin(chipAt(event.target)));
page.view.addEventListener("pointerover", (event) => {
  const at = chipAt(event.target);
  if (event.pointerType === "mouse" && pinned < 0 && at >= 0 && at !== selected && !page.generate.disabled) select(at);
});
page.view.addEventListener("keydown", (event) => {
  const to = { ArrowLeft: selected - 1, ArrowRight: selected + 1, Home: 0, End: tokens.length - 1, Escape: -1 }[event.key];
  if (to === undefined || !tokens.length || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  pinned = event.key === "Escape" ? -1 : Math.max(0, Math.min(tokens.length - 1, to));
  select(pinned);
  page.chips.children[selected + 1]?.scrollIntoView?.({ block: "nearest" });
});
page.layer.addEventListener("change", showAttention);
page.head.addEventListener("change", showAttention);
new ResizeObserver(drawLines).observe(page.view);

function cell(event) {
  const box = page.map.getBoundingClientRect();
  return [event.clientY - box.top, event.clientX - box.left].map((at) => Math.floor((at / box.width) * attention.queries));
}
page.map.addEventListener("pointermove", (event) => {
  if (!attention) return;
  const [query, key] = cell(event);
  const name = (at) => `“${(tokens[attention.start + at]?.text ?? "").replaceAll("\n", "↵")}”`;
  page.weight.textContent = key <= query ? `${name(query)} attends to ${name(key)}: ${weight(query, key).toFixed(4)}` : "\u00a0";
});
page.map.addEventListener("click", (event) => attention && pin(attention.start + cell(event)[0]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => model && drawMap());

// ---- start ----

function choose(id, value) {
  const slider = page[id];
  const given = value ?? Number(slider.dataset.off);
  slider.max = Math.max(Number(slider.max), given);
  slider.value = given;
  if (slider.valueAsNumber !== given) exact[id] = given;
  slider.dispatchEvent(new Event("input"));
}

async function start() {
  info = await (await fetch("model.json")).json();
  document.title = `${info.name} – lmlight`;
  page.name.textContent = info.name;
  page.facts.textContent = info.facts;
  for (const id of sliders) choose(id, info.sampling[id]);
  page.seed.value = info.sampling.seed;
  page.tokens.value = info.sampling.max_new_tokens;
  page.text.value = info.prompt;
  const [providers, answer] = await Promise.all([startEngine(info.engine), fetch("model.onnx")]);
  model = await Model.open(new Uint8Array(await answer.arrayBuffer()), providers);
  const ignored = [info.sampling.repetition_penalty !== 1 && "repetition_penalty", info.sampling.stop.length && "stop"];
  const without = ignored.filter(Boolean).join(" and ");
  if (without) page.facts.textContent += `. The page ignores the setting ${without} of the model`;
  page.engine.textContent = `Engine: onnxruntime-web, ${providers[0]}${crossOriginIsolated ? ", threads" : ""}.`;
  page.attention.hidden = !model.hasAttention;
  if (model.hasAttention) {
    const { layers, heads } = await model.attention([model.bos_id ?? 0]);
    for (let layer = 0; layer < layers; layer++) page.layer.add(new Option(layer + 1, layer));
    page.head.add(new Option("mean", "mean"));
    for (let head = 0; head < heads; head++) page.head.add(new Option(head + 1, head));
  }
  reading = read();
  await reading;
  page.generate.disabled = page.one.disabled = false;
}

start().catch((error) => say(`The model cannot be opened: ${error.message}`));
