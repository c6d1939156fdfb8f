/**
 * A language model in a browser, from a file that `lmlight export web` wrote.
 *
 * - The metadata of the ONNX file has the sizes and the tokenizer.
 * - The graph maps (ids, past) to (logits, present, attention). Networks without a key-value cache have logits only.
 * - Probabilities, and greedy text, equal those of lmlight. Sampled text differs, because the random numbers differ.
 *
 * Axes: T new positions, V vocabulary.
 */
import { Tokenizer } from "./engine/tokenizers.min.mjs";

const PAST = 4; // the axis of past positions in (layers, 2, rows, heads, past, channels)
const MAX_WINDOW = 512; // tokens that are scored at once: attention weights of more would not fit into memory

let ort;

/** Loads onnxruntime-web: "webgpu" where the browser has it, else "wasm", with threads if the server isolates the page. */
export async function startEngine(wanted) {
  const gpu = wanted === "webgpu" && (await navigator.gpu?.requestAdapter());
  ort = await import(wanted === "webgpu" ? "./engine/ort.webgpu.min.mjs" : "./engine/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("./engine/", import.meta.url).href;
  return gpu ? ["webgpu", "wasm"] : ["wasm"];
}

/** A model and its tokenizer. */
export class Model {
  /**
   * @param {Uint8Array} file - An .onnx file.
   * @param {string[]} executionProviders - From `startEngine`.
   * @throws {Error} The file was not written by lmlight, or its tokenizer is lossy and therefore missing.
   */
  static async open(file, executionProviders) {
    const metadata = readMetadata(file);
    if (!metadata.block_size) throw new Error("this file was not written by lmlight export");
    if (!metadata["tokenizer.json"]) throw new Error("the model's tokenizer is lossy, so it is not in the file");
    return new Model(await ort.InferenceSession.create(file, { executionProviders }), metadata);
  }

  constructor(session, metadata) {
    this.session = session;
    this.running = Promise.resolve(); // the engine does one thing at a time
    Object.assign(this, metadata);
    this.window = Math.min(this.block_size, MAX_WINDOW);
    this.hasAttention = session.outputNames.includes("attention");
    // the default removes spaces before full stops
    this.tokenizer = new Tokenizer(metadata["tokenizer.json"], { clean_up_tokenization_spaces: false });
    const { vocab } = metadata["tokenizer.json"].model;
    this.pieces = Array.isArray(vocab) ? vocab.map(([piece]) => piece) : [];
    if (!Array.isArray(vocab)) for (const [piece, id] of Object.entries(vocab)) this.pieces[id] = piece;
  }

  /**
   * Returns the ids of a text, the same as lmlight's.
   * @throws {Error} A character is not in the vocabulary of a character tokenizer.
   */
  encode(text) {
    if (!text) return [];
    const { ids, tokens } = this.tokenizer.encode(text.replaceAll("\n", this.newline));
    // the library implements byte fallback for BPE only
    return tokens.flatMap((token, at) => (this.tokenizer.token_to_id(token) === undefined ? this.bytes(token) : ids[at]));
  }

  bytes(text) {
    return [...new TextEncoder().encode(text)].map((byte) => {
      const id = this.tokenizer.token_to_id(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
      if (id === undefined) throw new Error(`the model does not know '${[...text][0]}'`);
      return id;
    });
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids) : ""; // the library rejects an empty array
  }

  /** The text of one token. A byte that is no character by itself is shown as ‹E2›, the end of a document as ‹end›. */
  label(id) {
    if (id === this.eos_id) return "‹end›";
    const byte = /^<0x([0-9A-F]{2})>$/.exec(this.pieces[id] ?? "");
    const text = byte && parseInt(byte[1], 16) > 127 ? "\ufffd" : this.decode([id]);
    return text.includes("\ufffd") && byte ? `‹${byte[1]}›` : text;
  }

  /** Runs the graph on the ids of T new tokens, after a past if there is one. Returns the outputs with these names. */
  run(ids, past, outputs) {
    const input = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    const names = outputs.filter((name) => this.session.outputNames.includes(name));
    const run = () => this.session.run(past ? { ids: input, past } : { ids: input }, names);
    this.running = this.running.then(run, run);
    return this.running;
  }

  /** The past before the first token; undefined for a network without one. */
  emptyPast() {
    const shape = this.session.inputMetadata.find(({ name }) => name === "past")?.shape;
    if (!shape) return undefined;
    const [layers, two, , heads, , channels] = shape;
    return new ort.Tensor("float32", new Float32Array(0), [layers, two, 1, heads, 0, channels]);
  }

  /**
   * Scores a text: yields the logits (V) of the second token, of the third, …, and of the one after the last. In a text of
   * several windows, each overlaps half of the one before, as in `lmlight test`.
   */
  async *score(ids) {
    const step = Math.ceil(this.window / 2);
    for (let from = 0, done = 0; done < ids.length; from += step) {
      const { logits } = await this.run(ids.slice(from, from + this.window), this.emptyPast(), ["logits"]);
      for (let row = done - from; row < logits.dims[1]; row++, done++) yield rowOf(logits, row);
    }
  }

  /** Attention weights (layers, heads, T, T) of one window of tokens, flat, and their shape. */
  async attention(ids) {
    const { attention } = await this.run(ids, this.emptyPast(), ["attention"]);
    const [layers, , heads, queries, keys] = attention.dims;
    return { weights: attention.data, layers, heads, queries, keys };
  }
}

/** A text that grows: the logits of the next token, and the tokens so far. */
export class Stream {
  /** @throws {Error} There is no token to start from. */
  constructor(model, ids) {
    if (!ids.length && model.bos_id === null) throw new Error("the model needs a prompt");
    this.model = model;
    this.ids = ids.length ? [...ids] : [model.bos_id];
    this.past = model.emptyPast();
    this.newIds = this.ids.slice(-model.block_size);
  }

  /** The logits (V) of the next token. */
  async next() {
    const { model } = this;
    if (!this.past) return lastRow((await model.run(this.ids.slice(-model.block_size), undefined, ["logits"])).logits);
    let logits;
    while (this.newIds.length) {
      if (this.past.dims[PAST] === model.block_size) {
        // full: slide the window, or recompute with the later half of the block, as lmlight does
        if (model.supports_sliding_window) this.past = newest(this.past, model.block_size - 1);
        else [this.past, this.newIds] = [model.emptyPast(), this.ids.slice(-Math.max(1, model.block_size >> 1))];
      }
      const outputs = await model.run(this.newIds.splice(0, MAX_WINDOW), this.past, ["logits", "present"]);
      this.past = outputs.present;
      logits = outputs.logits;
    }
    return lastRow(logits);
  }

  push(id) {
    this.ids.push(id);
    this.newIds.push(id);
  }
}

/**
 * The probabilities (V) from which a token is drawn: lmlight's filters, in its order.
 *
 * @param {Float32Array} logits
 * @param {{temperature: number, top_k: number, top_p: number, min_p: number}} settings - 0 disables `top_k` and `min_p`.
 */
export function probabilities(logits, { temperature = 1, top_k = 0, top_p = 1, min_p = 0 } = {}) {
  const likeliest = argmax(logits);
  if (temperature === 0) return Float64Array.from(logits, (_, id) => Number(id === likeliest));
  let weights = Float64Array.from(logits, (logit) => Math.exp((logit - logits[likeliest]) / temperature));
  if (top_k && top_k < weights.length) {
    const smallest = weights.toSorted()[weights.length - top_k];
    weights = weights.map((weight) => (weight < smallest ? 0 : weight));
  }
  if (top_p < 1) {
    const total = sum(weights);
    let before = 0;
    for (const id of Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a])) {
      const weight = weights[id];
      if (before >= top_p * total) weights[id] = 0;
      before += weight;
    }
  }
  if (min_p) weights = weights.map((weight) => (weight < min_p ? 0 : weight)); // the likeliest weighs 1
  const total = sum(weights);
  return weights.map((weight) => weight / total);
}

/** Draws an id by inverting the cumulative distribution at a random number in [0, 1). */
export function draw(probability, random) {
  let left = random * sum(probability);
  const id = probability.findIndex((weight) => (left -= weight) < 0);
  return id < 0 ? argmax(probability) : id; // rounding error
}

/** Nats of a token: the negative logarithm of its probability. */
export function loss(logits, id) {
  const highest = logits[argmax(logits)];
  let total = 0;
  for (const logit of logits) total += Math.exp(logit - highest);
  return Math.log(total) + highest - logits[id];
}

/** The ids of the largest values, largest first. */
export function largest(values, count) {
  const found = [];
  for (let id = 0; id < values.length; id++) {
    if (found.length === count && values[id] <= values[found[count - 1]]) continue;
    let at = found.length;
    while (at && values[found[at - 1]] < values[id]) at--;
    found.splice(at, 0, id);
    found.length = Math.min(found.length, count);
  }
  return found;
}

/** Seeded random numbers in [0, 1), which browsers lack: Tommy Ettinger's mulberry32. */
export function randomNumbers(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

function argmax(values) {
  let best = 0;
  for (let at = 1; at < values.length; at++) if (values[at] > values[best]) best = at;
  return best;
}

function sum(values) {
  let total = 0;
  for (const value of values) total += value;
  return total;
}

function rowOf(logits, row) {
  const size = logits.dims[2];
  return logits.data.slice(row * size, (row + 1) * size);
}

function lastRow(logits) {
  return rowOf(logits, logits.dims[1] - 1);
}

/** The last `count` positions of a past. */
function newest(past, count) {
  const channels = past.dims[PAST + 1];
  const [before, after] = [past.dims[PAST] * channels, count * channels];
  const data = new Float32Array((past.data.length / before) * after);
  for (let from = before, to = 0; to < data.length; from += before, to += after) {
    data.set(past.data.subarray(from - after, from), to);
  }
  return new ort.Tensor("float32", data, past.dims.with(PAST, count));
}

/** The metadata of an ONNX file, field 14 of its protocol buffer, which onnxruntime-web does not expose. */
function readMetadata(file) {
  const text = new TextDecoder();
  const found = {};
  for (const [number, entry] of fields(file)) {
    if (number === 14) {
      const [[, key], [, value]] = fields(entry);
      found[text.decode(key)] = JSON.parse(text.decode(value));
    }
  }
  return found;
}

/** The length-delimited fields of a protocol buffer: skips numbers, and stops at anything else. */
function* fields(bytes) {
  let at = 0;
  const number = () => {
    let [value, scale, byte] = [0, 1, 128];
    for (; byte & 128; scale *= 128) value += ((byte = bytes[at++]) & 127) * scale;
    return value;
  };
  while (at < bytes.length) {
    const tag = number();
    if (tag % 8 === 0) number();
    else if (tag % 8 === 2) {
      const length = number();
      yield [tag >> 3, bytes.subarray(at, at + length)];
      at += length;
    } else return;
  }
}
