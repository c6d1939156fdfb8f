/**
 * Generates text in a browser with a file written by `lmlight export onnx`.
 *
 * - The metadata of the ONNX file has the sizes and the tokenizer, so the file is self-contained.
 * - The graph maps (ids, past) to (logits, present). It runs once for the prompt and once for each new token.
 * - Greedy text equals that of lmlight. Sampled text differs, because the random numbers differ.
 */
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.mjs";

const PAST = 4; // the axis of past positions in (layers, 2, rows, heads, past, channels)

/** A model and its tokenizer. */
export class Model {
  /**
   * @param {Uint8Array} file - An .onnx file.
   * @throws {Error} The file was not written by lmlight, or its tokenizer is lossy and therefore missing.
   */
  static async open(file) {
    const metadata = readMetadata(file);
    if (!metadata.block_size) throw new Error("not a file of lmlight export onnx");
    if (!metadata["tokenizer.json"]) throw new Error("the model's tokenizer is lossy, so it is not in the file");
    return new Model(await ort.InferenceSession.create(file), metadata);
  }

  constructor(session, metadata) {
    this.session = session;
    this.metadata = metadata;
    // the default removes spaces before full stops
    this.tokenizer = new Tokenizer(metadata["tokenizer.json"], { clean_up_tokenization_spaces: false });
  }

  /**
   * Returns the ids of a text, the same as lmlight's.
   * @throws {Error} A character is not in the vocabulary of a character tokenizer.
   */
  encode(text) {
    if (!text) return [];
    const { ids, tokens } = this.tokenizer.encode(text);
    // the library implements byte fallback for BPE only
    return tokens.flatMap((token, at) => (this.tokenizer.token_to_id(token) === undefined ? this.bytes(token) : ids[at]));
  }

  bytes(text) {
    return [...new TextEncoder().encode(text)].map((byte) => {
      const id = this.tokenizer.token_to_id(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
      if (id === undefined) throw new Error(`the model does not know '${text}'`);
      return id;
    });
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids) : ""; // the library rejects an empty array
  }

  /**
   * Continues a prompt and yields all new ids after each token. A character of which some bytes are missing decodes to
   * U+FFFD.
   *
   * @param {string} prompt - The text to continue. An empty one starts a document or a line.
   * @param {number} maxNewTokens - Number of tokens to add.
   * @param {number} temperature - Divides the logits; 0 always takes the most likely token.
   * @param {number} seed - Seed of the random numbers.
   */
  async *generate(prompt, maxNewTokens, temperature, seed) {
    const { block_size, supports_sliding_window, bos_id, eos_id } = this.metadata;
    const ids = this.encode(prompt);
    if (!ids.length && bos_id === null) throw new Error("the model needs a prompt");
    if (!ids.length) ids.push(bos_id);
    const generated = [];
    const random = randomNumbers(seed);
    let past = this.emptyPast();
    let newIds = ids.slice(-block_size);
    while (generated.length < maxNewTokens) {
      if (past && past.dims[PAST] === block_size) {
        // full: slide the window, or recompute with the later half of the block, as lmlight does
        if (supports_sliding_window) past = newest(past, block_size - 1);
        else [past, newIds] = [this.emptyPast(), ids.slice(-Math.max(1, block_size >> 1))];
      }
      const input = new ort.Tensor("int64", BigInt64Array.from(newIds, BigInt), [1, newIds.length]);
      const { logits, present } = await this.session.run(past ? { ids: input, past } : { ids: input });
      const id = sample(logits.data.subarray(-logits.dims[2]), temperature, random);
      if (id === eos_id) return;
      ids.push(id);
      [past, newIds] = [present, present ? [id] : ids.slice(-block_size)];
      generated.push(id);
      yield generated;
    }
  }

  /** The past before the first token; undefined for a network without one, such as a bigram table. */
  emptyPast() {
    const shape = this.session.inputMetadata.find(({ name }) => name === "past")?.shape;
    if (!shape) return undefined;
    const [layers, two, , heads, , channels] = shape;
    return new ort.Tensor("float32", new Float32Array(0), [layers, two, 1, heads, 0, channels]);
  }
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

/** Samples an id: the most likely at temperature 0, else by the inverse of the distribution function. */
export function sample(logits, temperature, random) {
  const likeliest = logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
  if (temperature === 0) return likeliest;
  const weights = Array.from(logits, (logit) => Math.exp((logit - logits[likeliest]) / temperature));
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const id = weights.findIndex((weight) => (left -= weight) < 0);
  return id < 0 ? likeliest : id; // rounding error
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
