/**
 * Writes text with a file of `lmlight export onnx` in a browser, as `lmlight predict` does, but with other random numbers.
 *
 * - The sizes and the tokenizer are in the ONNX file's own metadata: the file is all there is to a model.
 * - The prompt is one run of the graph, each further token another: (ids, past) to (logits, present).
 */
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.mjs";

const PAST = 4; // the axis of past positions in (layers, 2, rows, heads, past, channels)

/** A model, opened. */
export class Model {
  /**
   * @param {Uint8Array} file - An .onnx file.
   * @throws {Error} It is none of lmlight's, or its tokenizer is lossy and has not travelled along.
   */
  static async open(file) {
    const about = metadata(file);
    if (!about.block_size) throw new Error("this is no file of lmlight export onnx");
    if (!about["tokenizer.json"]) throw new Error("this model's tokenizer is lossy, so it is not in the file");
    return new Model(await ort.InferenceSession.create(file), about);
  }

  constructor(session, about) {
    this.session = session;
    this.about = about;
    // the library's stock setting takes out spaces before full stops
    this.tokenizer = new Tokenizer(about["tokenizer.json"], { clean_up_tokenization_spaces: false });
  }

  /**
   * The ids of a text, the same as lmlight's.
   * @throws {Error} A character vocabulary lacks one of its characters.
   */
  encode(text) {
    if (!text) return [];
    const { ids, tokens } = this.tokenizer.encode(text);
    // what a unigram vocabulary lacks is bytes, which the library does for BPE alone
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
    return ids.length ? this.tokenizer.decode(ids) : ""; // the library refuses none
  }

  /**
   * Continues a prompt; yields after each token the ids written so far. Decoded, a character that is half written is
   * U+FFFD until its other bytes come.
   *
   * @param {string} prompt - What is continued. An empty one begins a document, or a line.
   * @param {number} maxNewTokens - Tokens added to it.
   * @param {number} temperature - Divides the logits; 0 always takes the likeliest token.
   * @param {number} seed - Of the random numbers.
   */
  async *write(prompt, maxNewTokens, temperature, seed) {
    const { block_size, slides, start, end } = this.about;
    const ids = this.encode(prompt);
    if (!ids.length && start === null) throw new Error("the model does not begin by itself: give it a prompt");
    if (!ids.length) ids.push(start);
    const written = [];
    const random = randomNumbers(seed);
    let past = this.nothing();
    let fresh = ids.slice(-block_size);
    while (written.length < maxNewTokens) {
      if (past && past.dims[PAST] === block_size) {
        // full: as lmlight does, the oldest is forgotten, or positions begin anew with the block's later half
        if (slides) past = newest(past, block_size - 1);
        else [past, fresh] = [this.nothing(), ids.slice(-Math.max(1, block_size >> 1))];
      }
      const input = new ort.Tensor("int64", BigInt64Array.from(fresh, BigInt), [1, fresh.length]);
      const { logits, present } = await this.session.run(past ? { ids: input, past } : { ids: input });
      const id = sample(logits.data.subarray(-logits.dims[2]), temperature, random);
      if (id === end) return;
      [past, fresh] = [present, [id]];
      ids.push(id);
      written.push(id);
      yield written;
    }
  }

  /** The past of a first token; undefined for a bigram table, which has none. */
  nothing() {
    const shape = this.session.inputMetadata.find(({ name }) => name === "past")?.shape;
    if (!shape) return undefined;
    const [layers, two, , heads, , channels] = shape;
    return new ort.Tensor("float32", new Float32Array(0), [layers, two, 1, heads, 0, channels]);
  }
}

/** The past without its oldest positions. */
function newest(past, kept) {
  const channels = past.dims[PAST + 1];
  const [before, after] = [past.dims[PAST] * channels, kept * channels];
  const data = new Float32Array((past.data.length / before) * after);
  for (let from = before, to = 0; to < data.length; from += before, to += after) {
    data.set(past.data.subarray(from - after, from), to);
  }
  return new ort.Tensor("float32", data, past.dims.with(PAST, kept));
}

/** An id out of logits: the likeliest at temperature 0, else where the distribution function passes a random number. */
export function sample(logits, temperature, random) {
  const likeliest = logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
  if (temperature === 0) return likeliest;
  const weights = Array.from(logits, (logit) => Math.exp((logit - logits[likeliest]) / temperature));
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const id = weights.findIndex((weight) => (left -= weight) < 0);
  return id < 0 ? likeliest : id; // by rounding alone
}

/** Numbers in [0, 1) that follow from a seed, which browsers' own do not: Tommy Ettinger's mulberry32. */
export function randomNumbers(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** An ONNX file's metadata, which onnxruntime-web does not give: field 14 of its protocol buffer, keys and values. */
function metadata(file) {
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

/** The fields of a protocol buffer that have a length; numbers are passed over, and it ends at what is not one. */
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
