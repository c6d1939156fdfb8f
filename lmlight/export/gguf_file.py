"""Export to a GGUF file for llama.cpp and the programs built on it, such as Ollama and LM Studio.

- llama.cpp's Qwen3 always uses SiLU, from which we build ReLU²: silu(k h) h / k differs from relu(h)² by less than
  0.54 / k². So the gate is scaled by k, and the up and down matrices by 1/√k each.
- llama.cpp's Llama rotates neighboring channels where we rotate the two halves of a head, so the rows of queries and
  keys are interleaved.
- llama.cpp calls a unigram tokenizer `t5`. It has no byte fallback: ASCII characters that the training text lacks take
  the place of their byte pieces, and other unseen characters become `<unk>`. BPE (`llama`) has byte fallback.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from lmlight.data.hf_tokenizer import HFTokenizer
from lmlight.data.tokenizer import SentencePieceTokenizer
from lmlight.errors import UserError
from lmlight.export.architectures import match_architecture, named_weights
from lmlight.export.model import Model, require_extra
from lmlight.export.tokenizer import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, Piece, Vocabulary, pre_tokenizer_name
from lmlight.models import Transformer

# k in the module docstring. A power of two, so scaling is exact; √k divides both up and down, which keeps all matrices in
# float16's range.
SHARPNESS, ROOT = 4096.0, 64.0


def write(model: Model, path: Path, precision: str = "f32") -> None:
    """Writes a `.gguf` file.

    `precision` (f32, f16 or q8_0) applies to matrices; everything else is float32. With q8_0, matrices whose row length
    is not a multiple of 32 are float16.

    Raises:
        UserError: llama.cpp does not support the network or the tokenizer; gguf is not installed.
    """
    (gguf,) = require_extra("gguf", "gguf")
    architecture, net = match_architecture(model.net), model.net
    assert isinstance(net, Transformer)
    options = net.config
    writer = gguf.GGUFWriter(path, architecture.gguf_name)
    writer.add_name(f"lmlight {Path(model.corpus_name() or 'model').stem}")
    writer.add_context_length(net.block_size)
    writer.add_embedding_length(options["n_embd"])
    writer.add_block_count(options["n_layer"])
    writer.add_feed_forward_length(net.intermediate_size)
    writer.add_head_count(options["n_head"])
    writer.add_head_count_kv(net.n_kv_head)
    writer.add_vocab_size(net.vocab_size)
    (writer.add_layer_norm_rms_eps if options["norm"] == "rmsnorm" else writer.add_layer_norm_eps)(options["norm_eps"])
    if options["positions"] == "rotary":
        writer.add_rope_freq_base(options["rope_theta"])
        writer.add_rope_dimension_count(net.head_size)
        writer.add_key_length(net.head_size)
        writer.add_value_length(net.head_size)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if precision == 'f32' else 'MOSTLY'}_{precision.upper()}"])
    _add_tokenizer(writer, model)
    for _, name, value in named_weights(net.float()):
        if architecture.gguf_name == "llama" and (".attn_q." in name or ".attn_k." in name):
            value = interleave_rope(value, net.head_size)
        if options["mlp"] == "relu2" and ".ffn_gate." in name:
            value = value * SHARPNESS
        elif options["mlp"] == "relu2" and (".ffn_up." in name or ".ffn_down." in name):
            value = value / ROOT
        array = value.contiguous().numpy()
        kind = "f32" if array.ndim == 1 else "f16" if precision == "q8_0" and array.shape[1] % 32 else precision
        quantization = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _add_tokenizer(writer: Any, model: Model) -> None:
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if isinstance(model.tokenizer, HFTokenizer):
        _add_byte_level_bpe(writer, model.tokenizer)
        return
    if not isinstance(model.tokenizer, SentencePieceTokenizer):
        raise UserError(
            f"llama.cpp cannot use a {type(model.tokenizer).__name__}: expected a tokenizer of kind unigram or bpe; "
            "train one with --data.tokenizer.kind=bpe"
        )
    vocabulary = Vocabulary(model.tokenizer)
    unknown, eos = vocabulary.unknown_id, model.tokenizer.eos_id
    # llama.cpp's strings cannot contain NUL
    pieces = [Piece("<0x00>", 0.0, BYTE) if piece.piece == "\0" else piece for piece in vocabulary.pieces]
    texts, scores, types = map(list, zip(*pieces))
    writer.add_tokenizer_model("t5" if vocabulary.is_unigram else "llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(unknown)
    # where there is none, <unk>: the default ids would be ordinary tokens in our vocabulary
    writer.add_bos_token_id(unknown if model.bos_id is None else model.bos_id)
    writer.add_eos_token_id(unknown if eos is None else eos)
    writer.add_pad_token_id(unknown)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)


def _add_byte_level_bpe(writer: Any, tokenizer: HFTokenizer) -> None:
    name, model = pre_tokenizer_name(tokenizer), tokenizer.content["model"]
    if name is None:
        raise UserError(
            "GGUF export supports the pre-tokenizers of GPT-2, SmolLM2, Qwen2 and Llama 3, but this checkpoint's "
            "tokenizer.json has a different one, or a normalizer: export to hf or onnx"
        )
    pieces = {index: (f"<unused {index}>", UNUSED) for index in range(tokenizer.vocab_size)}
    pieces |= {index: (text, NORMAL) for text, index in model["vocab"].items()}
    for token in tokenizer.content.get("added_tokens", []):
        pieces[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    # by default, llama.cpp ends a text at id 11, an ordinary token; byte 0xFF is in no text
    never = next((index for index, (_, kind) in pieces.items() if kind in (CONTROL, UNUSED)), model["vocab"].get("ÿ"))
    end = never if tokenizer.eos_id is None else tokenizer.eos_id
    if end is None:
        raise UserError("GGUF export needs a tokenizer with an EOS token: export to hf or onnx")
    texts, types = map(list, zip(*pieces.values()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)


def interleave_rope(rows: Tensor, head_size: int) -> Tensor:
    """Reorders the rows of each head, of a weight or a bias: channels i and i + D/2 become 2 i and 2 i + 1."""
    halves = rows.view(-1, 2, head_size // 2, *rows.shape[1:])
    return halves.transpose(1, 2).flatten(0, 2)
