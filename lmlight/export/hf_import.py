"""A small Llama-shaped folder of Hugging Face's becomes a net and a tokenizer of ours, to finetune.

- Architectures: llama, mistral, qwen3, arcee; those with the parts that `Transformer` has.
- Tokenizers: SentencePiece's alone (`tokenizer.model`). One with byte pieces is made lossless, that is, it no longer puts a
  space before a text or changes characters; its pieces and ids stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlight.data.tokenizer import SentencePieceTokenizer
from lmlight.errors import UserError
from lmlight.export.model import Model, need
from lmlight.export.vocabulary import parse
from lmlight.models import Transformer
from lmlight.models.transformer import default_intermediate_size

READS = ("llama", "mistral", "qwen3", "arcee")
ACTIVATIONS = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}


def read(folder: Path) -> tuple[Model, list[str]]:
    """The model in a folder, and what about it is no longer as it was there.

    Raises:
        UserError: something in it has no counterpart here: which, and what there would have to be.
    """
    (safetensors,) = need("hf", "safetensors.torch")
    config = _config(folder)
    tokenizer, notes = _tokenizer(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"'{folder}' holds no .safetensors file: pass a folder whose weights are in that format")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= safetensors.load_file(file)
        except Exception as error:  # of a type of its own
            raise UserError(f"'{file}' cannot be read ({error}): fetch it again") from None
    try:
        options = _options(config, tensors)
    except KeyError as error:
        raise UserError(f"'{folder / 'config.json'}' lacks {error.args[0]}: fetch it again") from None
    rows = tensors["model.embed_tokens.weight"].size(0) if "model.embed_tokens.weight" in tensors else 0
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"the net has {rows:,} tokens and tokenizer.model {tokenizer.vocab_size:,}: pass a folder whose two fit"
        )
    if rows > tokenizer.vocab_size:
        notes.append(f"{rows - tokenizer.vocab_size:,} of {rows:,} tokens are not in tokenizer.model and were left out")
    net = Transformer(tokenizer.vocab_size, _block_size(config), **options).eval()
    net.load_state_dict(_state(net, tensors))
    return Model(net, tokenizer, {}, {"data": {"block_size": net.block_size}}, {}, 0), notes


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except OSError as error:
        raise UserError(
            f"'{folder / 'config.json'}' cannot be read ({error.strerror}): pass the folder of a Hugging Face model"
        ) from None
    except (ValueError, AttributeError):
        raise UserError(f"'{folder / 'config.json'}' is damaged: fetch it again") from None
    if kind not in READS:
        raise UserError(f"model_type {kind} is not Llama-shaped: {', '.join(READS[:-1])} and {READS[-1]} can be read")
    return config


def _tokenizer(folder: Path) -> tuple[SentencePieceTokenizer, list[str]]:
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise UserError(
            f"the tokenizer of '{folder}' is {_kind(folder)}: only SentencePiece's tokenizer.model can be read"
        )
    data = path.read_bytes()
    try:
        tokenizer = SentencePieceTokenizer(data)
    except ValueError:
        raise UserError(f"'{path}' is not a SentencePiece model: only such tokenizers can be read") from None
    proto = parse(data)
    normalizer = proto.normalizer_spec
    changes = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.name != "identity"
    if changes and proto.trainer_spec.byte_fallback:
        normalizer.name, normalizer.precompiled_charsmap = "identity", b""
        normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
        plain = SentencePieceTokenizer(proto.SerializeToString())
        if plain.lossless:
            return plain, ["its tokenizer no longer puts a space before a text or changes characters"]
    return tokenizer, [] if tokenizer.lossless else ["its tokenizer is lossy"]


def _kind(folder: Path) -> str:
    """What a tokenizer that is not SentencePiece's calls itself."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        kind = content["model"].get("type", "of a kind that its tokenizer.json does not name")
    except (OSError, ValueError, LookupError, AttributeError):
        return "missing"
    return (
        f"byte-level {kind}"
        if "ByteLevel" in json.dumps(content.get("pre_tokenizer"))
        else f"a bare {kind} tokenizer.json"
    )


def _block_size(config: dict[str, Any]) -> int:
    positions: int = config.get("max_position_embeddings", 2048)
    windowed = config["model_type"] == "mistral" or config.get("use_sliding_window")
    return min(positions, (windowed and config.get("sliding_window")) or positions)


def _options(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of `Transformer` but for the two sizes.

    Raises:
        UserError: something that it does not have.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    width, heads = config["hidden_size"], config["num_attention_heads"]
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    gated = config["model_type"] != "arcee"
    activation = config.get("hidden_act", "silu" if gated else "relu2")
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    if not gated:
        mlp = ACTIVATIONS.get(activation)
    elif activation == "relu" and gate in tensors and up in tensors and torch.equal(tensors[gate], tensors[up]):
        mlp = "relu2"
    else:
        mlp = "swiglu" if activation == "silu" else None
    for fits, what in (
        (rope.get("rope_type", rope.get("type", "default")) == "default", "scaled rotary positions"),
        (
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) == 1.0,
            "partial rotary positions",
        ),
        ((config.get("head_dim") or width // heads) * heads == width, "heads that are not hidden_size / heads wide"),
        (attention_bias == mlp_bias, "a bias in the attention or the MLP alone; here both have one or none"),
        (mlp is not None, f"hidden_act {activation}, which is no MLP of ours"),
    ):
        if not fits:
            raise UserError(f"this net cannot be read, for it has {what}: pass another")
    options: dict[str, Any] = {
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_embd": width,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "norm": "rmsnorm",
        "positions": "rotary",
        "mlp": mlp,
        "qk_norm": config["model_type"] == "qwen3",
        "bias": attention_bias,
        "tie": config.get("tie_word_embeddings", False),
        "intermediate_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),  # defaults as in transformers
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }
    if options["n_kv_head"] == heads:
        options["n_kv_head"] = None
    if mlp is not None and options["intermediate_size"] == default_intermediate_size(mlp, width):
        options["intermediate_size"] = None
    return options


def _state(net: Transformer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names.

    Raises:
        UserError: one is missing, of another shape, or left over.
    """
    parts = {
        "attention_norm": ["input_layernorm"],
        "mlp_norm": ["post_attention_layernorm"],
        "attention.qkv": [f"self_attn.{letter}_proj" for letter in "qkv"],
        "attention.output": ["self_attn.o_proj"],
        "attention.q_norm": ["self_attn.q_norm"],
        "attention.k_norm": ["self_attn.k_norm"],
        "mlp.up": ["mlp.gate_proj", "mlp.up_proj"] if net.config["mlp"] == "swiglu" else ["mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
        "embedding": ["model.embed_tokens"],
        "norm": ["model.norm"],
        "head": ["model.embed_tokens" if net.config["tie"] else "lm_head"],
    }
    state: dict[str, Tensor] = {}
    read = {"lm_head.weight"} if net.config["tie"] else set()
    for name, ours in net.state_dict().items():
        module, _, what = name.rpartition(".")
        _, number, part = module.split(".", 2) if module.startswith("blocks.") else ("", "", module)
        sources = [f"model.layers.{number}.{source}.{what}" if number else f"{source}.{what}" for source in parts[part]]
        if missing := [source for source in sources if source not in tensors]:
            raise UserError(f"the weights lack {missing[0]}, which config.json promises: fetch the folder again")
        value = torch.cat([tensors[source] for source in sources])
        if part in ("embedding", "head"):
            value = value[: net.vocab_size]
        if value.shape != ours.shape:
            wanted = " × ".join(map(str, ours.shape))
            raise UserError(
                f"{sources[0]} and its like make {' × '.join(map(str, value.shape))}, not {wanted}: see config.json"
            )
        state[name] = value.to(ours.dtype)
        read |= set(sources)
    if net.config["mlp"] == "relu2":  # the gate is the same matrix
        read |= {name for name in tensors if ".mlp.gate_proj." in name and _twin(name, tensors)}
    left = sorted(name for name in tensors.keys() - read if not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise UserError(f"the weights hold {left[0]}, which has no place in this net: pass another")
    return state


def _twin(gate: str, tensors: dict[str, Tensor]) -> bool:
    return torch.equal(tensors[gate], tensors[gate.replace("gate_proj", "up_proj")])
