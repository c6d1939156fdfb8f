"""Import of a model from a Hugging Face folder.

- Families: GPT-2, Llama (including SmolLM2), Mistral, Qwen2 and Qwen3, if `Transformer` has the options they need.
- Tokenizers: any `tokenizer.json`, or lmlight's own `tokenizer.model`.
- Weights: safetensors, in one file or several. One tensor is read at a time.
"""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlight.data.hf_tokenizer import read_pretrained
from lmlight.data.tokenizer import Tokenizer
from lmlight.errors import UserError
from lmlight.export.architectures import weight_names
from lmlight.export.model import Model, require_extra
from lmlight.models import GPT2, LLAMA, Transformer
from lmlight.user_code import explained

MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
Weights = dict[str, Callable[[], Tensor]]  # by their names in transformers; a call reads the tensor


def read(folder: Path) -> tuple[Model, list[str]]:
    """Returns the model in a folder, and a note for each difference from the original.

    Raises:
        UserError: the folder is incomplete or damaged, or the model needs an option that `Transformer` lacks.
    """
    path = folder / "config.json"
    with explained(f"expected the folder of a Hugging Face model, and '{path}' cannot be read"):
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"expected a model_type of {', '.join(MODEL_TYPES)}, got {model_type}: pass another model")
    is_gpt2 = model_type == "gpt2"
    tokenizer, notes = _tokenizer(folder)
    weights = _open_weights(folder, is_gpt2)
    with explained(f"'{path}' describes no model that can be built, so download it again"):
        options = (_gpt2_options if is_gpt2 else _llama_options)(config)
        net = Transformer(tokenizer.vocab_size, _block_size(config), **options).eval()
    with explained(f"the weights in '{folder}' cannot be read, so download them again"):
        rows = _load_weights(net, weights, is_gpt2)
    if rows > tokenizer.vocab_size:
        notes.append(f"{rows - tokenizer.vocab_size:,} embedding rows without a token were left out")
    return Model(net, tokenizer, {}, {"data": {"block_size": net.block_size}}, {}, 0), notes


def _tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """The tokenizer and notes. A `tokenizer.model` that is not from lmlight changes spaces and newlines."""
    with suppress(UserError):  # there is none, or it is not SentencePiece's
        own = read_pretrained(folder / "tokenizer.model")
        if own.lossless:
            return own, []
    if not (general := folder / "tokenizer.json").is_file():
        raise UserError(f"'{folder}' has no tokenizer.json: save the tokenizer with a current version of transformers")
    tokenizer = read_pretrained(general)
    lossy = "the tokenizer is lossy: it changes spaces or characters of a text"
    return tokenizer, [] if tokenizer.lossless else [lossy]


def _block_size(config: dict[str, Any]) -> int:
    if config["model_type"] == "gpt2":
        return int(config["n_positions"])
    uses_window = config["model_type"] == "mistral" or config.get("use_sliding_window")
    window = config.get("sliding_window") if uses_window else None
    size = min(config["max_position_embeddings"], window or math.inf)
    _require((isinstance(size, int), f"a context of {size} tokens"))
    return int(size)


def _require(*conditions: tuple[bool, str]) -> None:
    for supported, found in conditions:
        if not supported:
            raise UserError(f"the model has {found}, which lmlight does not support: pass another model")


def _gpt2_options(config: dict[str, Any]) -> dict[str, Any]:
    """The `Transformer` arguments other than `vocab_size` and `block_size`."""
    activation = config.get("activation_function", "gelu_new")
    _require(
        (activation in ("gelu_new", "gelu_pytorch_tanh"), f"activation_function {activation}"),
        (config.get("scale_attn_weights", True), "scale_attn_weights false"),
        (not config.get("scale_attn_by_inverse_layer_idx"), "scale_attn_by_inverse_layer_idx"),
        (not config.get("add_cross_attention"), "add_cross_attention"),
    )
    return {
        **GPT2,
        **{name: config[name] for name in ("n_layer", "n_head", "n_embd")},
        "tie": config.get("tie_word_embeddings", True),
        "intermediate_size": config.get("n_inner"),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }


def _llama_options(config: dict[str, Any]) -> dict[str, Any]:
    """See `_gpt2_options`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rotary_factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    model_type, activation = config["model_type"], config.get("hidden_act", "silu")
    bias = config.get("attention_bias", False)
    _require(
        (rope_type == "default", f"rope_type {rope_type}"),
        (not any(isinstance(value, dict) for value in rope.values()), "different rope_parameters in some layers"),
        (rotary_factor == 1, f"partial_rotary_factor {rotary_factor}"),
        (model_type == "qwen2" or bias == config.get("mlp_bias", False), "a bias in attention or MLP only"),
        (activation in ("silu", "relu"), f"hidden_act {activation}"),
    )
    return {
        **LLAMA,
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "n_kv_head": config.get("num_key_value_heads"),
        "head_size": config.get("head_dim"),
        "mlp": "swiglu" if activation == "silu" else "relu2",  # a gated ReLU with equal gate and value is ReLU²
        "qk_norm": model_type == "qwen3",
        "bias": "qkv" if model_type == "qwen2" else bias,
        "tie": config.get("tie_word_embeddings", False),
        "intermediate_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),  # the default of transformers
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }


def _open_weights(folder: Path, gpt2: bool) -> Weights:
    """The weights in the safetensors files of a folder."""
    (safetensors,) = require_extra("hf", "safetensors")
    # other names are of copies, such as Mistral's consolidated.safetensors
    if not (paths := sorted(folder.glob("model*.safetensors"))):
        hint = "weights in another format may run code when they are read"
        raise UserError(f"'{folder}' has no model.safetensors: pass one that does ({hint})")
    weights: Weights = {}
    for path in paths:
        with explained(f"'{path}' cannot be read, so download it again"):
            file = safetensors.safe_open(path, framework="pt")
            weights |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118  (cannot be iterated)
    if gpt2 and "wte.weight" in weights:  # the names on the hub
        return {f"transformer.{name}": read_one for name, read_one in weights.items()}
    return weights


def _load_weights(net: Transformer, weights: Weights, gpt2: bool) -> int:
    """Copies the weights into `net`; returns the number of rows of the embedding."""
    buffers = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # of old versions of transformers
    unused, rows = {name for name in weights if not name.endswith(buffers)}, 0
    for name, parameter in net.state_dict().items():  # shares memory with the network
        names = [hf for hf, _ in weight_names(name, gpt2)]
        unused -= {*names}
        is_tied = name == "head.weight" and net.config["tie"]
        if is_tied and names[0] not in weights:
            continue
        if missing := [hf for hf in names if hf not in weights]:
            raise UserError(f"the weights lack {missing[0]}, which config.json requires: download the folder again")
        values = [weights[hf]() for hf in names]
        if name in ("embedding.weight", "head.weight"):
            rows = len(values[0])
            values[0] = values[0][: net.vocab_size]
        if gpt2 and ".h." in names[0] and values[0].ndim == 2:
            values[0] = values[0].mT  # GPT-2's Conv1D stores (in, out)
        if ".mlp.up." in name and net.config["mlp"] == "relu2":
            gate, up = values
            _require((torch.equal(gate, up), "hidden_act relu"))
            values = [up]
        value = torch.cat(values)
        if value.shape != parameter.shape:
            expected, found = (" × ".join(map(str, shape)) for shape in (parameter.shape, value.shape))
            raise UserError(
                f"expected {expected} weights in {', '.join(names)}, got {found}: download the folder again"
            )
        if is_tied and not torch.equal(value.float(), parameter):  # transformers does not tie them then
            raise UserError(f"config.json has tie_word_embeddings true, but {names[0]} differs: set it to false")
        if not parameter.copy_(value).isfinite().all():
            raise UserError(f"weights in {', '.join(names)} are not finite numbers: pass another model")
    if unused:
        raise UserError(f"the weights include {min(unused)}, which lmlight does not support: pass another model")
    return rows
