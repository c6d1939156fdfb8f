/**
 * The page: connects its elements with a model.
 *
 * The text is `tokens`: for each its id, its text, and the logits that predicted it. Editing the text scores it anew; generating
 * appends to it.
 */
import { AttentionView } from "./attention.js";
import { Model, Stream, draw, loss, probabilities, randomNumbers, startEngine } from "./model.js";
import { openSettings, settings } from "./settings.js";
import { showBars, showTokens } from "./tokens.js";

const KEPT_LOGITS = 2 ** 26; // numbers: 256 MB
const LINE_END = /(?<=[^:\s])\r?\n/; // where lmlight ends a text with `end_at_line`

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

let info; // model.json
let model;
let attention; // undefined for a network without attention
let tokens = [];
let next = null; // the logits of the next token
let selected = -1;
let pinned = -1; // selected by a click or a key, not by hovering
let version = 0; // of the text; work on an older one stops
let generation = null; // what continues the text: its stream, prompt, ids and random numbers; null after an edit
let reading = null; // the promise of the scoring in progress
let editing = 0; // the timer of an edit that is not read yet
let problem = ""; // why the text cannot be read
let stopping = false;
let current = ""; // the text that was read or written last
const earlier = []; // the texts before it

// ---- scoring ----

/** Encodes and scores the text in the box. */
async function read() {
  const mine = ++version;
  generation = null;
  keepEarlier();
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

/** Keeps the text before an edit or a generation, for `undo`. */
function keepEarlier() {
  if (page.text.value === current) return;
  earlier.push(current);
  current = page.text.value;
  page.undo.disabled = false;
}

function undo() {
  clearTimeout(editing);
  editing = 0;
  // an edit that is not read yet comes after `current`
  current = page.text.value === current ? earlier.pop() : current;
  page.text.value = current;
  page.undo.disabled = !earlier.length;
  reading = read();
}

/** Reads what has been typed so far. */
function readTyped() {
  clearTimeout(editing);
  if (editing) reading = read();
  editing = 0;
  return reading;
}

/** Records the logits that predicted a token. The first one is not scored: nothing is before it. */
function score(at, logits) {
  if (at > 0) tokens[at].nats = loss(logits, tokens[at].id);
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
      const now = performance.now();
      const isDue = now - drawnAt > 30;
      const mayEnd = info.sampling.end_at_line && count >= Math.ceil(0.8 * most);
      const before = mayEnd ? model.decode(ids.slice(0, -1)).length : 0; // `text` may be older
      if (isDue || mayEnd) text = model.decode(ids);
      if (mayEnd) end = endOfLine(text, before);
      if (isDue && end < 0) {
        write(prompt + text);
        say(speed(count + 1, now - began));
        await drawn();
        drawnAt = performance.now();
      }
    }
    if (end >= 0) ending = "Done, at the end of a line";
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
    keepEarlier();
    setBusy(false);
    say(ending);
  }
}

/** The index, from `before` on, at which lmlight's option `end_at_line` would end the text; -1 if there is none. */
function endOfLine(text, before) {
  const from = Math.max(0, before - 1);
  const at = text.slice(from).search(LINE_END);
  return at < 0 ? -1 : from + at;
}

/** Shows a text that is being generated. */
function write(text) {
  page.text.value = text.replace(/\ufffd+$/, ""); // bytes of a character to come
  page.text.scrollTop = page.text.scrollHeight;
  showText();
  page.view.scrollTop = page.view.scrollHeight;
  showNext();
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
  page.undo.disabled = busy || !earlier.length;
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
  showText();
  showNext();
  showSelected();
}

function showText() {
  showTokens(page.chips, tokens);
  const total = tokens.reduce((sum, { nats }) => sum + (nats ?? 0), 0);
  // of the decoded text: in the box, a line break is always one character
  const [all, first] = [tokens, tokens.slice(0, 1)].map((some) => [...model.decode(some.map(({ id }) => id))].length);
  const scored = all - first;
  page.total.textContent = tokens.length
    ? `${counted(tokens.length)}, ${total.toFixed(4)} nats` +
      (scored > 0 ? `, ${(total / scored).toFixed(4)} nats per character, without the first token` : "")
    : "\u00a0";
}

function showNext() {
  showBars(page["next-bars"], model, next, settings());
}

/** Shows what was likely in place of the selected token. */
async function showInstead() {
  const at = selected;
  const logits = tokens[at] && (await logitsAt(at));
  if (at === selected) showBars(page["instead-bars"], model, logits, settings(), tokens[at]?.id);
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
  const token = tokens[selected];
  page.chips.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", false);
  if (token) page.chips.children[selected + 1]?.setAttribute("aria-selected", true);
  if (token) page.view.setAttribute("aria-activedescendant", `token-${selected}`);
  else page.view.removeAttribute("aria-activedescendant");
  const unscored = selected > 0 ? "not scored yet" : "the first token is not scored";
  const nats = token?.nats === undefined ? unscored : `${token.nats.toFixed(4)} nats`;
  page["instead-title"].textContent = token ? `“${token.text.replaceAll("\n", "↵")}”: ${nats}` : "Selected token";
  await showInstead();
  await attention?.show(tokens, selected);
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
page.undo.addEventListener("click", undo);
page.seed.addEventListener("change", () => (generation = null));
page.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !page.generate.disabled) page.generate.click();
});

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

// ---- start ----

async function start() {
  info = await (await fetch("model.json")).json();
  document.title = `${info.name} – lmlight`;
  page.name.textContent = info.name;
  page.facts.textContent = info.facts;
  openSettings(info.sampling, () => {
    if (!model) return;
    showNext();
    showInstead();
  });
  page.text.value = info.prompt;
  current = page.text.value;
  const [providers, answer] = await Promise.all([startEngine(info.engine), fetch("model.onnx")]);
  model = await Model.open(new Uint8Array(await answer.arrayBuffer()), providers);
  const ignored = [info.sampling.repetition_penalty !== 1 && "repetition_penalty", info.sampling.stop.length && "stop"];
  const without = ignored.filter(Boolean).join(" and ");
  if (without) page.facts.textContent += `. This page ignores the model's ${without}`;
  page.engine.textContent = `Engine: onnxruntime-web, ${providers[0]}${crossOriginIsolated ? ", threads" : ""}.`;
  page.attention.hidden = page.heads.hidden = !model.hasAttention;
  if (model.hasAttention) {
    attention = new AttentionView(page, model, pin);
    await attention.open();
  }
  reading = read();
  await reading;
  page.generate.disabled = page.one.disabled = false;
}

start().catch((error) => say(`The model cannot be opened: ${error.message}`));
