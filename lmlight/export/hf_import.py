"""Import of a small Llama-like model from a Hugging Face folder.

- Architectures: llama, mistral and qwen3, where `Transformer` has the options.
- Tokenizers: SentencePiece only (`tokenizer.model`). One with byte pieces becomes lossless: it no longer adds a space in
  front of a text or normalizes characters. Pieces and ids stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlight.data.tokenizer import SentencePieceTokenizer
from lmlight.errors import UserError
from lmlight.export.architectures import weight_names
from lmlight.export.model import Model, require_extra
from lmlight.export.tokenizer import parse_model
from lmlight.models import Transformer
from lmlight.models.transformer import default_intermediate_size

MODEL_TYPES = ("llama", "mistral", "qwen3")


def read(folder: Path) -> tuple[Model, list[str]]:
    """Returns the model in a folder, and a note for each difference from the original.

    Raises:
        UserError: the folder is incomplete or damaged, or the model needs an option that `Transformer` lacks.
    """
    (safetensors,) = require_extra("hf", "safetensors.torch")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): pass the folder of a Hugging Face model") from None
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(
            f"expected a model_type of {', '.join(MODEL_TYPES)}, got {config.get('model_type')}: pass another"
        )
    tokenizer, notes = _tokenizer(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= safetensors.load_file(file)
        except Exception as error:  # safetensors has its own type
            raise UserError(f"'{file}' cannot be read ({error}): download it again") from None
    if not tensors:
        raise UserError(f"'{folder}' has no .safetensors file: pass a folder whose weights are in that format")
    try:
        net = Transformer(tokenizer.vocab_size, _block_size(config), **_options(config, tensors)).eval()
    except KeyError as error:
        raise UserError(f"'{path}' lacks {error.args[0]}: download it again") from None
    extra = len(tensors.get("model.embed_tokens.weight", ())) - tokenizer.vocab_size
    if extra > 0:
        notes.append(f"{extra:,} tokens that are not in tokenizer.model were left out")
    net.load_state_dict(_state(net, tensors))
    return Model(net, tokenizer, {}, {"data": {"block_size": net.block_size}}, {}, 0), notes


def _tokenizer(folder: Path) -> tuple[SentencePieceTokenizer, list[str]]:
    path = folder / "tokenizer.model"
    try:
        data = path.read_bytes()
        tokenizer = SentencePieceTokenizer(data)
    except (OSError, ValueError):
        raise UserError(f"'{path}' is missing or damaged: only SentencePiece tokenizers can be imported") from None
    proto = parse_model(data)
    normalizer = proto.normalizer_spec
    changes_text = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.name != "identity"
    if changes_text and proto.trainer_spec.byte_fallback:
        normalizer.name, normalizer.precompiled_charsmap = "identity", b""
        normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
        plain = SentencePieceTokenizer(proto.SerializeToString())
        if plain.lossless:
            return plain, ["the tokenizer no longer adds a space in front of a text or normalizes characters"]
    return tokenizer, [] if tokenizer.lossless else ["the tokenizer is lossy"]


def _block_size(config: dict[str, Any]) -> int:
    positions: int = config.get("max_position_embeddings", 2048)
    has_window = config["model_type"] == "mistral" or config.get("use_sliding_window")
    return min(positions, (has_window and config.get("sliding_window")) or positions)


def _options(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The `Transformer` arguments other than `vocab_size` and `block_size`.

    Raises:
        KeyError: the config lacks a size.
        UserError: the model needs an option that `Transformer` lacks.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rotary_factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    width, heads, hidden = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    bias, activation = config.get("attention_bias", False), config.get("hidden_act", "silu")
    # a gated ReLU with equal gate and value is ReLU²
    gates = [name for name in tensors if ".mlp.gate_proj." in name]
    is_relu2 = all(torch.equal(tensors[name], tensors[name.replace("gate_proj", "up_proj")]) for name in gates)
    mlp = "swiglu" if activation == "silu" else "relu2" if activation == "relu" and is_relu2 else None
    for supported, found in (
        (rope_type == "default", f"rope_type {rope_type}"),
        (rotary_factor == 1, f"partial_rotary_factor {rotary_factor:g}"),
        ((config.get("head_dim") or width // heads) * heads == width, "a head_dim other than hidden_size / heads"),
        (bias == config.get("mlp_bias", False), "a bias in attention or MLP only"),
        (mlp is not None, f"hidden_act {activation}"),
    ):
        if not supported:
            raise UserError(f"the model has {found}, which lmlight does not support: pass another model")
    assert mlp is not None
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_embd": width,
        "n_kv_head": None if kv_heads == heads else kv_heads,
        "norm": "rmsnorm",
        "positions": "rotary",
        "mlp": mlp,
        "qk_norm": config["model_type"] == "qwen3",
        "bias": bias,
        "tie": config.get("tie_word_embeddings", False),
        "intermediate_size": None if hidden == default_intermediate_size(mlp, width) else hidden,
        "norm_eps": config.get("rms_norm_eps", 1e-6),  # the default of transformers
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }


def _state(net: Transformer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as a state dict of `net`.

    Raises:
        UserError: the tensors are not those of such a network.
    """
    state: dict[str, Tensor] = {}
    unused = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    for name, parameter in net.state_dict().items():
        names = [hf for hf, _ in weight_names(name)]
        unused -= {*names}
        if name == "head.weight" and net.config["tie"]:
            state[name] = state["embedding.weight"]
            continue
        if missing := [hf for hf in names if hf not in tensors]:
            raise UserError(f"the weights lack {missing[0]}, which config.json requires: download the folder again")
        if ".mlp.up." in name and net.config["mlp"] == "relu2":
            names = names[1:]  # the gate is the same
        value = torch.cat([tensors[hf] for hf in names])
        if name in ("embedding.weight", "head.weight"):
            value = value[: net.vocab_size]
        if value.shape != parameter.shape:
            expected, found = (" × ".join(map(str, tensor.shape)) for tensor in (parameter, value))
            raise UserError(
                f"expected {expected} weights in {', '.join(names)}, got {found}: download the folder again"
            )
        state[name] = value.to(parameter.dtype)
    if unused:
        raise UserError(f"the weights include {min(unused)}, which lmlight does not support: pass another model")
    return state
