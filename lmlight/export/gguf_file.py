"""A GGUF file for llama.cpp, and what is built on it: Ollama, LM Studio.

- llama.cpp's architectures fix their activation. Qwen3's is SiLU, gated, of which ReLU² can be made: silu(k h) h / k is
  relu(h)² but for less than 0.54 / k². So the gate is k times the other matrix, and what follows is divided by k.
- Llama's and Arcee's rotary positions turn neighbours there, where ours turn halves: rows of queries and keys change
  places.
- A unigram tokenizer is what llama.cpp calls t5. It knows no bytes: ASCII that the training text lacks takes the place of
  its byte piece, and other unseen characters become `<unk>`. A BPE tokenizer (`llama`) has bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmlight.data.tokenizer import SentencePieceTokenizer
from lmlight.errors import UserError
from lmlight.export import hf
from lmlight.export.architectures import architecture_of
from lmlight.export.model import Model, need
from lmlight.export.vocabulary import KINDS, Vocabulary
from lmlight.models import Net, Transformer

Precision = Literal["f32", "f16", "q8_0"]
# k: a power of two, so that nothing is rounded; its root is shared by two matrices, which keeps float16 in its range
SHARP, ROOT = 4096.0, 64.0
TYPES = {kind: number for number, kind in KINDS.items()}  # llama.cpp's numbers are SentencePiece's
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
}


def write(model: Model, path: Path, precision: Precision = "f32") -> None:
    """Writes a `.gguf` file.

    Args:
        model: to be taken along.
        path: of the file.
        precision: of the matrices; everything else is float32. In q8_0 those whose rows are no multiple of 32 long are f16.

    Raises:
        UserError: llama.cpp has no such net or tokenizer; gguf is not installed.
    """
    (gguf,) = need("gguf", "gguf")
    architecture, net = _architecture(model.net), model.net
    tokenizer = _tokenizer(model)
    assert isinstance(net, Transformer), "which a stock architecture is"
    ours = net.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"lmlight {Path(str(model.settings.get('data', {}).get('corpus', 'model'))).stem}")
    writer.add_context_length(net.block_size)
    writer.add_embedding_length(ours["n_embd"])
    writer.add_block_count(ours["n_layer"])
    writer.add_feed_forward_length(net.intermediate_size)
    writer.add_head_count(ours["n_head"])
    writer.add_head_count_kv(net.n_kv_head)
    writer.add_vocab_size(net.vocab_size)
    (writer.add_layer_norm_rms_eps if ours["norm"] == "rmsnorm" else writer.add_layer_norm_eps)(ours["norm_eps"])
    if ours["positions"] == "rotary":
        writer.add_rope_freq_base(ours["rope_theta"])
        writer.add_rope_dimension_count(net.head_size)
        writer.add_key_length(net.head_size)
        writer.add_value_length(net.head_size)
    if architecture == "stablelm":
        writer.add_parallel_residual(False)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[precision]])
    for method, value in tokenizer.items():
        getattr(writer, f"add_{method}")(value)
    for name, array in _arrays(net, architecture).items():
        kind = "f32" if array.ndim == 1 else "f16" if precision == "q8_0" and array.shape[1] % 32 else precision
        quantization = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _architecture(net: Net) -> str:
    """llama.cpp's name.

    Raises:
        UserError: it has none with this net's activation; the message says which would fit.
    """
    stock, mlp = architecture_of(net), net.config["mlp"]
    if stock == "arcee" and mlp == "gelu":
        raise UserError(
            "llama.cpp has no RMSNorm with GELU: this net has mlp gelu, and relu2 would fit; "
            "train one with --model.net.mlp relu2"
        )
    if stock == "gpt2" and mlp == "relu2":
        raise UserError(
            "llama.cpp has no learned positions with ReLU²: this net has mlp relu2, and gelu would fit; "
            "train one with --model.net.mlp gelu"
        )
    if stock == "starcoder2" and mlp == "relu2":
        return "nemotron"
    return "llama" if stock == "mistral" else stock


def _tokenizer(model: Model) -> dict[str, Any]:
    """What to tell the writer: a method's name without `add_`, and its argument.

    Raises:
        UserError: a character vocabulary, or a lossy tokenizer.
    """
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError(
            "llama.cpp has no character vocabularies: this tokenizer's kind is char, and unigram or bpe would fit; "
            "train one with --data.tokenizer.kind bpe"
        )
    vocabulary = Vocabulary.of(tokenizer)
    texts, scores, types = map(list, zip(*((p.text, p.score, TYPES[p.kind]) for p in vocabulary.pieces)))
    if vocabulary.algorithm == "unigram":
        for index, character in vocabulary.ascii_bytes().items():
            if character != "\0":
                texts[index], scores[index], types[index] = character, vocabulary.unknown_score, TYPES["normal"]
    unknown = next((index for index, piece in enumerate(vocabulary.pieces) if piece.kind == "unknown"), 0)
    return {
        "tokenizer_model": "t5" if vocabulary.algorithm == "unigram" else "llama",
        "token_list": texts,
        "token_scores": scores,
        "token_types": types,
        "unk_token_id": unknown,
        "bos_token_id": unknown if model.start is None else model.start,
        "eos_token_id": unknown if model.end is None else model.end,  # the stock id is an innocent token's
        "pad_token_id": unknown,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": False,
        "remove_extra_whitespaces": False,
    }


def _arrays(net: Transformer, architecture: str) -> dict[str, npt.NDArray[np.float32]]:
    ours, tensors = net.config, hf.tensors(net.float())
    if ours["tie"]:  # not every architecture there falls back on the embedding
        tensors["lm_head.weight"] = net.state_dict()["head.weight"]
    arrays = {}
    for name, value in tensors.items():
        module, _, what = name.rpartition(".")
        layered = module.removeprefix("model.layers.").removeprefix("transformer.h.")
        number, part = layered.split(".", 1) if layered != module else ("", module)
        if architecture == "gpt2" and number and value.ndim == 2:
            value = value.mT
        if architecture in ("llama", "arcee") and part in ("self_attn.q_proj", "self_attn.k_proj"):
            value = _neighbours(value, net.head_size)
        if architecture == "qwen3" and ours["mlp"] == "relu2" and part.startswith("mlp."):
            value = value * SHARP if part == "mlp.gate_proj" else value / ROOT
        target = f"blk.{number}.{NAMES[part]}" if number else NAMES[part]
        arrays[f"{target}.{what}"] = value.contiguous().numpy()
        if architecture == "starcoder2" and number and what == "weight" and value.ndim == 2 and not ours["bias"]:
            arrays[f"{target}.bias"] = np.zeros(value.size(0), np.float32)
    return arrays


def _neighbours(rows: Tensor, head_size: int) -> Tensor:
    """Rows of each head so that what were channels i and i + D/2 are 2 i and 2 i + 1."""
    halves = rows.view(-1, 2, head_size // 2, *rows.shape[1:])  # of a matrix or a bias
    return halves.transpose(1, 2).flatten(0, 2)
