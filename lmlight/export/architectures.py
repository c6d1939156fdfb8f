"""The architectures that other engines support, and their names for a network's weights.

Hugging Face and GGUF export use both tables; Hugging Face import uses only `MODULES`.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from lmlight.errors import UserError
from lmlight.models import Net, Transformer

# Columns: our module, its name in transformers' Llama and GPT-2, its name in llama.cpp. `*` is the block's index.
# A module listed several times is split by the rows of its weight, or repeated (ReLU²).
MODULES = [
    ("embedding", "model.embed_tokens", "transformer.wte", "token_embd"),
    ("positions", "", "transformer.wpe", "position_embd"),
    ("blocks.*.attention_norm", "model.layers.*.input_layernorm", "transformer.h.*.ln_1", "blk.*.attn_norm"),
    ("blocks.*.attention.qkv", "", "transformer.h.*.attn.c_attn", "blk.*.attn_qkv"),
    ("blocks.*.attention.qkv", "model.layers.*.self_attn.q_proj", "", "blk.*.attn_q"),
    ("blocks.*.attention.qkv", "model.layers.*.self_attn.k_proj", "", "blk.*.attn_k"),
    ("blocks.*.attention.qkv", "model.layers.*.self_attn.v_proj", "", "blk.*.attn_v"),
    ("blocks.*.attention.q_norm", "model.layers.*.self_attn.q_norm", "", "blk.*.attn_q_norm"),
    ("blocks.*.attention.k_norm", "model.layers.*.self_attn.k_norm", "", "blk.*.attn_k_norm"),
    (
        "blocks.*.attention.output",
        "model.layers.*.self_attn.o_proj",
        "transformer.h.*.attn.c_proj",
        "blk.*.attn_output",
    ),
    ("blocks.*.mlp_norm", "model.layers.*.post_attention_layernorm", "transformer.h.*.ln_2", "blk.*.ffn_norm"),
    ("blocks.*.mlp.up", "model.layers.*.mlp.gate_proj", "", "blk.*.ffn_gate"),
    ("blocks.*.mlp.up", "model.layers.*.mlp.up_proj", "transformer.h.*.mlp.c_fc", "blk.*.ffn_up"),
    ("blocks.*.mlp.down", "model.layers.*.mlp.down_proj", "transformer.h.*.mlp.c_proj", "blk.*.ffn_down"),
    ("norm", "model.norm", "transformer.ln_f", "output_norm"),
    ("head", "lm_head", "lm_head", "output"),
]


class Architecture(NamedTuple):
    """An architecture that both transformers and llama.cpp support."""

    model_type: str  # its name in transformers
    class_name: str  # the class of its language model in transformers
    gguf_name: str  # its name in llama.cpp
    sliding_window: bool  # beyond `block_size` tokens, transformers attends to the last ones, as lmlight does
    options: dict[str, list[Any]]  # the `Transformer` options that it prescribes, with the allowed values


_LLAMA: dict[str, list[Any]] = {"norm": ["rmsnorm"], "positions": ["rotary"], "qk_norm": [False], "mlp": ["swiglu"]}
_GPT2: dict[str, list[Any]] = {"norm": ["layernorm"], "positions": ["learned"], "qk_norm": [False], "mlp": ["gelu"]}
_GPT2 |= {"bias": [True, False], "n_kv_head": [None], "head_size": [None]}
# ReLU² in Qwen3 is a gated ReLU with equal gate and value: relu(h) h = relu(h)².
_QWEN3 = _LLAMA | {"qk_norm": [True], "mlp": ["relu2", "swiglu"], "bias": [False]}
ARCHITECTURES = [
    Architecture("qwen3", "Qwen3ForCausalLM", "qwen3", True, _QWEN3),
    Architecture("qwen2", "Qwen2ForCausalLM", "qwen2", True, _LLAMA | {"bias": ["qkv"]}),
    # Mistral is Llama with a sliding window and without biases.
    Architecture("mistral", "MistralForCausalLM", "llama", True, _LLAMA | {"bias": [False]}),
    Architecture("llama", "LlamaForCausalLM", "llama", False, _LLAMA | {"bias": [True]}),
    Architecture("gpt2", "GPT2LMHeadModel", "gpt2", False, _GPT2),
]


def match_architecture(net: Net) -> Architecture:
    """Returns the architecture that is equivalent to `net`.

    Raises:
        UserError: there is none; the message names the nearest one and the options that differ.
    """
    if type(net) is not Transformer:  # a subclass may compute something else
        raise UserError(
            f"a {type(net).__name__} cannot be exported to this format, which is for Transformer only: export to onnx or "
            "torch"
        )
    n_head, width = net.config["n_head"], net.config["n_embd"]
    options = net.config | {"n_kv_head": None if net.n_kv_head == n_head else net.n_kv_head}
    options["head_size"] = None if net.head_size * n_head == width else net.head_size

    def differing(architecture: Architecture) -> list[str]:
        return [name for name, allowed in architecture.options.items() if options[name] not in allowed]

    nearest = min(ARCHITECTURES, key=lambda architecture: len(differing(architecture)))
    if names := differing(nearest):
        found = ", ".join(f"{name} {_yaml(options[name])}" for name in names)
        flags = " ".join(f"--model.net.{name}={_yaml(nearest.options[name][0])}" for name in names)
        raise UserError(
            f"no supported architecture has {found} with this network's other options; the nearest is "
            f"{nearest.model_type}: train one with {flags}"
        )
    return nearest


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def weight_names(name: str, gpt2: bool = False) -> list[tuple[str, str]]:
    """The names in transformers and llama.cpp of the tensors that make up the parameter `name` of a `Transformer`."""
    module, _, kind = name.rpartition(".")
    block, module = re.sub(r"\D", "", module), re.sub(r"\d+", "*", module)
    found = [(gpt2_name if gpt2 else llama, gguf) for ours, llama, gpt2_name, gguf in MODULES if ours == module]
    return [(f"{hf}.{kind}".replace("*", block), f"{gguf}.{kind}".replace("*", block)) for hf, gguf in found if hf]


def named_weights(net: Transformer) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (name in transformers, name in llama.cpp, value) of each weight; values share memory with `net`.

    A tied head is left out. GPT-2 has biases everywhere: those that `net` lacks are zeros.
    """
    is_gpt2 = match_architecture(net).model_type == "gpt2"
    kv_size = net.n_kv_head * net.head_size
    for name, value in net.state_dict().items():
        if name == "head.weight" and net.config["tie"]:
            continue
        names, parts = weight_names(name, is_gpt2), [value]
        if len(names) == 3:
            parts = list(value.split([net.config["n_head"] * net.head_size, kv_size, kv_size]))
        elif len(names) == 2:
            parts = list(value.chunk(2)) if net.config["mlp"] == "swiglu" else [value, value]
        for (hf, gguf), part in zip(names, parts, strict=True):
            yield hf, gguf, part
        if is_gpt2 and not net.config["bias"] and name.startswith(("blocks", "norm")):
            hf, gguf = (one.removesuffix("weight") + "bias" for one in names[0])
            yield hf, gguf, value.new_zeros(value.size(0))
