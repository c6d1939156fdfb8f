"""Import of a model from a Hugging Face folder.

- Families: GPT-2, Llama (including SmolLM2), Mistral, Qwen2 and Qwen3, if `Transformer` has the options they need.
- Tokenizers: any `tokenizer.json`, or lmlight's own `tokenizer.model`.
- Weights: safetensors, in one file or several. One tensor is read at a time.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlight.data.hf_tokenizer import read_pretrained
from lmlight.data.tokenizer import CharTokenizer, Tokenizer
from lmlight.errors import UserError, reason
from lmlight.export.architectures import weight_names
from lmlight.export.model import Model, require_extra
from lmlight.models import GPT2, LLAMA, Transformer
from lmlight.models.transformer import default_intermediate_size

MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


def read(folder: Path) -> tuple[Model, list[str]]:
    """Returns the model in a folder, and a note for each difference from the original.

    Raises:
        UserError: the folder is incomplete or damaged, or the model needs an option that `Transformer` lacks.
    """
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"expected model_type to be one of {', '.join(MODEL_TYPES)}, got {model_type}: pass another model"
        )
    tokenizer, notes = _tokenizer(folder)
    weights = Weights(folder, model_type == "gpt2")
    try:
        options = (_gpt2_options if model_type == "gpt2" else _llama_options)(config)
        net = Transformer(tokenizer.vocab_size, _block_size(config), **options).eval()
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError, MemoryError) as error:
        raise UserError(
            f"'{folder / 'config.json'}' is not a valid model configuration ({reason(error)}): download it again"
        ) from None
    if options["mlp"] == "relu2" and not weights.gates_are_equal():
        raise UserError("hidden_act relu is supported only if gate_proj equals up_proj: pass another model")
    rows = weights.load_into(net)
    if rows > tokenizer.vocab_size:
        notes.append(f"{rows - tokenizer.vocab_size:,} embedding rows without a token were left out")
    return Model(net, tokenizer, {}, {"data": {"block_size": net.block_size}}, {}, 0), notes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read ({reason(error)}): pass the folder of a Hugging Face model") from None
    return content


def _tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """The tokenizer and notes. A `tokenizer.model` that is not from lmlight changes spaces and newlines."""
    with suppress(UserError):  # there is none, or it is not SentencePiece's
        own = read_pretrained(folder / "tokenizer.model")
        if own.lossless:
            return own, []
    if not (general := folder / "tokenizer.json").is_file():
        raise UserError(f"'{folder}' has no tokenizer.json: save the tokenizer with a current version of transformers")
    try:
        tokenizer = read_pretrained(general)
    except UserError:
        if (characters := _characters(_read_json(general))) is None:
            raise
        tokenizer = characters
    lossy = "the tokenizer is lossy: it changes spaces or characters of a text"
    return tokenizer, [] if tokenizer.lossless else [lossy]


def _characters(content: dict[str, Any]) -> CharTokenizer | None:
    """The tokenizer, if lmlight exported it from a `CharTokenizer`, which encodes only the characters it was built from."""
    try:
        vocab = content["model"]["vocab"]
        if all(len(piece) == 1 and score == 0 for piece, score in vocab) and vocab:
            return CharTokenizer([piece for piece, _ in vocab], add_eos=bool(content["added_tokens"]))
    except (KeyError, TypeError, ValueError):
        pass
    return None


def _block_size(config: dict[str, Any]) -> int:
    if config["model_type"] == "gpt2":
        return _size(config, "n_positions")
    positions = _size(config, "max_position_embeddings")
    has_window = config.get("sliding_window") and (
        config["model_type"] == "mistral" or config.get("use_sliding_window")
    )
    return min(positions, _size(config, "sliding_window")) if has_window else positions


def _size(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"config.json needs an integer of at least 1 as {name}, got {value!r}: download it again")
    return value


def _require(*conditions: tuple[bool, str]) -> None:
    for supported, found in conditions:
        if not supported:
            raise UserError(f"the model has {found}, which lmlight does not support: pass another model")


def _gpt2_options(config: dict[str, Any]) -> dict[str, Any]:
    """The `Transformer` arguments other than `vocab_size` and `block_size`.

    Raises:
        UserError: the model needs an option that `Transformer` lacks.
    """
    activation = config.get("activation_function", "gelu_new")
    _require(
        (activation in ("gelu_new", "gelu_pytorch_tanh"), f"activation_function {activation}"),
        (config.get("scale_attn_weights", True) is True, "scale_attn_weights false"),
        (not config.get("scale_attn_by_inverse_layer_idx"), "scale_attn_by_inverse_layer_idx"),
        (not config.get("add_cross_attention"), "add_cross_attention"),
    )
    width = _size(config, "n_embd")
    return {
        **GPT2,
        "n_layer": _size(config, "n_layer"),
        "n_head": _size(config, "n_head"),
        "n_embd": width,
        "tie": config.get("tie_word_embeddings", True),
        "intermediate_size": None if config.get("n_inner") in (None, 4 * width) else _size(config, "n_inner"),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }


def _llama_options(config: dict[str, Any]) -> dict[str, Any]:
    """See `_gpt2_options`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rotary_factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    hidden, kv_heads = _size(config, "intermediate_size"), config.get("num_key_value_heads") or heads
    head_size, kind = config.get("head_dim"), config["model_type"]
    activation = config.get("hidden_act", "silu")
    bias = bool(config.get("attention_bias", False))
    _require(
        (rope_type == "default", f"rope_type {rope_type}"),
        (not any(isinstance(value, dict) for value in rope.values()), "different rope_parameters in some layers"),
        (rotary_factor == 1, f"partial_rotary_factor {rotary_factor}"),
        (kind == "qwen2" or bias == bool(config.get("mlp_bias", False)), "biases in only one of attention and MLP"),
        (activation in ("silu", "relu"), f"hidden_act {activation}"),
    )
    mlp = "swiglu" if activation == "silu" else "relu2"  # a gated ReLU with equal gate and value is ReLU²
    return {
        **LLAMA,
        "n_layer": _size(config, "num_hidden_layers"),
        "n_head": heads,
        "n_embd": width,
        "n_kv_head": None if kv_heads == heads else kv_heads,
        "head_size": None if head_size in (None, width // heads) else _size(config, "head_dim"),
        "mlp": mlp,
        "qk_norm": kind == "qwen3",
        "bias": "qkv" if kind == "qwen2" else bias,
        "tie": config.get("tie_word_embeddings", False),
        "intermediate_size": None if hidden == default_intermediate_size(mlp, width) else hidden,
        "norm_eps": config.get("rms_norm_eps", 1e-6),  # the default of transformers
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }


class Weights:
    """The tensors in the safetensors files of a folder, read when they are needed.

    Args:
        folder: the folder.
        gpt2: whether names and matrices are those of GPT-2.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, gpt2: bool) -> None:
        (safetensors,) = require_extra("hf", "safetensors")
        self._gpt2, self._files = gpt2, dict[str, Any]()
        # files with other names are copies, such as Mistral's consolidated.safetensors
        if not (paths := sorted(folder.glob("model*.safetensors"))):
            hint = "weights in another format may run code when they are read"
            raise UserError(f"'{folder}' has no model.safetensors: pass a folder that has one ({hint})")
        for path in paths:
            try:
                file = safetensors.safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
            except Exception as error:  # safetensors raises its own exception type
                raise UserError(f"'{path}' cannot be read ({reason(error)}): download it again") from None
        self._prefix = "transformer." if gpt2 and "wte.weight" in self._files else ""  # left out on the hub
        self._files = {f"{self._prefix}{name}": file for name, file in self._files.items()}

    def gates_are_equal(self) -> bool:
        """Whether every gate is equal to the projection that it multiplies."""
        gates = [name for name in self._files if ".mlp.gate_proj." in name]
        return all(torch.equal(self._read(name), self._read(name.replace("gate_proj", "up_proj"))) for name in gates)

    def load_into(self, net: Transformer) -> int:
        """Copies the weights into `net`; returns the number of rows of the embedding.

        Raises:
            UserError: the tensors do not match the network.
        """
        # buffers of old versions of transformers
        buffers = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
        unused = {name for name in self._files if not name.endswith(buffers)}
        rows = 0
        for name, parameter in net.state_dict().items():  # shares memory with the network
            names = [hf for hf, _ in weight_names(name, self._gpt2)]
            unused -= {*names}
            is_tied = name == "head.weight" and net.config["tie"]
            if is_tied and names[0] not in self._files:
                continue
            if missing := [hf for hf in names if hf not in self._files]:
                raise UserError(f"the weights lack {missing[0]}, which config.json requires: download the folder again")
            if ".mlp.up." in name and net.config["mlp"] == "relu2":
                names = names[1:]  # the gate is the same
            values = [self._read(hf) for hf in names]
            if name in ("embedding.weight", "head.weight"):
                rows = len(values[0])
                values[0] = values[0][: net.vocab_size]
            if self._gpt2 and ".h." in names[0] and values[0].ndim == 2:
                values[0] = values[0].mT  # GPT-2's Conv1D stores (in, out)
            value = values[0] if len(values) == 1 else torch.cat(values)
            if value.shape != parameter.shape:
                expected, found = (" × ".join(map(str, shape)) for shape in (parameter.shape, value.shape))
                raise UserError(
                    f"expected {expected} weights in {', '.join(names)}, got {found}: use this model's tokenizer and "
                    "config.json"
                )
            if is_tied and not torch.equal(value.float(), parameter):
                raise UserError(f"config.json has tie_word_embeddings true, but {names[0]} differs: set it to false")
            if not parameter.copy_(value).isfinite().all():
                raise UserError(f"weights in {', '.join(names)} are not finite numbers: pass another model")
        if unused:
            raise UserError(f"the weights include {min(unused)}, which lmlight does not support: pass another model")
        return rows

    def _read(self, name: str) -> Tensor:
        try:
            value: Tensor = self._files[name].get_tensor(name.removeprefix(self._prefix))
        except Exception as error:  # safetensors raises its own exception type
            raise UserError(f"weights {name} cannot be read ({reason(error)}): download the folder again") from None
        if not value.is_floating_point() or value.ndim == 0:
            raise UserError(f"expected floating-point weights in {name}, got {value.dtype}: pass another model")
        return value
