"""A folder for Hugging Face's transformers, opened by `AutoModelForCausalLM` and `AutoTokenizer` without code of ours.

The net becomes the stock architecture that it is (`architectures.py`), weight by weight: queries, keys and values are cut
apart, rotary halves stay as they are, and an MLP of ReLU² beside query/key norm becomes Qwen3's gate of ReLU with both
matrices alike. What an architecture has and a net lacks (the bias of a LayerNorm, of GPT-2's maps) becomes zeros.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lmlight
from lmlight.data.tokenizer import SentencePieceTokenizer, Tokenizer
from lmlight.export.architectures import WINDOWED, architecture_of
from lmlight.export.hf_tokenizer import tokenizer_json
from lmlight.export.model import Model, need
from lmlight.models import Net, Transformer

CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "llama": "LlamaForCausalLM",
    "arcee": "ArceeForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
GATED = ("qwen3", "mistral", "llama", "stablelm")
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
"""All that an export writes."""


def write(model: Model, folder: Path, licence: str) -> None:
    """Fills a folder.

    Args:
        model: to be taken along.
        folder: is there, and empty.
        licence: of the weights, as the model card gives it.

    Raises:
        UserError: the net has no stock architecture; the tokenizer is lossy; safetensors is not installed.
    """
    (safetensors,) = need("hf", "safetensors.torch")
    config, tokenizer = config_json(model), tokenizer_json(model.tokenizer)
    # not its save_file, which lets nobody else read the file
    (folder / "model.safetensors").write_bytes(safetensors.save(tensors(model.net), metadata={"format": "pt"}))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(model))
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(model))
    if isinstance(model.tokenizer, SentencePieceTokenizer):  # the way back to a checkpoint
        (folder / "tokenizer.model").write_bytes(model.tokenizer.to_bytes())
    (folder / "README.md").write_text(card(model, licence), encoding="utf-8", newline="\n")


def config_json(model: Model) -> dict[str, Any]:
    """The content of `config.json`; every value that another version's defaults could change is written out.

    Raises:
        UserError: the net has no stock architecture.
    """
    architecture, net = architecture_of(model.net), model.net
    assert isinstance(net, Transformer), "which a stock architecture is"
    ours = net.config
    dtype = str(next(net.parameters()).dtype).removeprefix("torch.")
    activation = {"swiglu": "silu", "gelu": "gelu_pytorch_tanh", "relu2": "relu2"}[ours["mlp"]]
    config: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": net.vocab_size,
        # the names of transformers before 5, and of 5
        "torch_dtype": dtype,
        "dtype": dtype,
        "tie_word_embeddings": ours["tie"],
        "bos_token_id": model.start,
        "eos_token_id": model.end,  # written also where texts do not end: the stock value is an innocent token's
        "pad_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
        "attention_dropout": ours["dropout"],
    }
    if architecture == "gpt2":
        del config["attention_dropout"]
        return config | {
            "n_positions": net.block_size,
            "n_embd": ours["n_embd"],
            "n_layer": ours["n_layer"],
            "n_head": ours["n_head"],
            "n_inner": net.intermediate_size,
            "activation_function": activation,
            "layer_norm_epsilon": ours["norm_eps"],
            "attn_pdrop": ours["dropout"],
            "embd_pdrop": ours["dropout"],
            "resid_pdrop": ours["dropout"],
        }
    config |= {
        "max_position_embeddings": net.block_size,
        "hidden_size": ours["n_embd"],
        "intermediate_size": net.intermediate_size,
        "num_hidden_layers": ours["n_layer"],
        "num_attention_heads": ours["n_head"],
        "num_key_value_heads": net.n_kv_head,
        "head_dim": net.head_size,
        "hidden_act": activation,
        "rms_norm_eps": ours["norm_eps"],
        "rope_theta": ours["rope_theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": ours["rope_theta"]},
    }
    if architecture in WINDOWED:
        config["sliding_window"] = net.block_size
    if architecture == "qwen3":
        config |= {"use_sliding_window": True, "max_window_layers": 0, "attention_bias": False}
        config["layer_types"] = ["sliding_attention"] * ours["n_layer"]
        if ours["mlp"] == "relu2":
            config["hidden_act"] = "relu"
    if architecture in ("llama", "arcee"):
        config |= {"attention_bias": ours["bias"], "mlp_bias": ours["bias"]}
    if architecture == "starcoder2":
        config |= {"use_bias": ours["bias"], "norm_epsilon": ours["norm_eps"]}
        config |= {"embedding_dropout": ours["dropout"], "residual_dropout": ours["dropout"]}
    if architecture == "stablelm":
        config |= {"layer_norm_eps": ours["norm_eps"], "hidden_dropout": ours["dropout"], "partial_rotary_factor": 1.0}
        config |= {"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False}
        config["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    return config


def tensors(net: Net) -> dict[str, Tensor]:
    """The weights under the names of the net's architecture, each in memory of its own.

    Raises:
        UserError: the net has no stock architecture.
    """
    architecture = architecture_of(net)
    assert isinstance(net, Transformer), "which a stock architecture is"
    state = {name: value.detach() for name, value in net.state_dict().items()}
    if net.config["tie"]:
        del state["head.weight"]
    named = _gpt2(net, state) if architecture == "gpt2" else _llama_like(net, state, architecture)
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in named.items()}


def _llama_like(net: Transformer, state: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    ours = net.config
    shares = [ours["n_embd"], net.n_kv_head * net.head_size, net.n_kv_head * net.head_size]
    ungated = ("c_fc", "c_proj") if architecture == "starcoder2" else ("up_proj", "down_proj")
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.output": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp.up": f"mlp.{ungated[0]}",
        "mlp.down": f"mlp.{ungated[1]}",
    }
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, what = name.rpartition(".")
        if not module.startswith("blocks."):
            named[{"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[module] + f".{what}"] = (
                value
            )
            continue
        _, number, part = module.split(".", 2)
        layer = f"model.layers.{number}"
        if part == "attention.qkv":
            for letter, rows in zip("qkv", torch.split(value, shares)):
                named[f"{layer}.self_attn.{letter}_proj.{what}"] = rows
        elif part == "mlp.up" and architecture in GATED:
            gate, up = value.chunk(2) if ours["mlp"] == "swiglu" else (value, value)
            named |= {f"{layer}.mlp.gate_proj.{what}": gate, f"{layer}.mlp.up_proj.{what}": up}
        else:
            named[f"{layer}.{names[part]}.{what}"] = value
    if ours["norm"] == "layernorm" and not ours["bias"]:
        for name in [name for name in named if name.endswith("norm.weight")]:
            named[name.removesuffix("weight") + "bias"] = torch.zeros_like(named[name])
    return named


def _gpt2(net: Net, state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, what = name.rpartition(".")
        number, part = module.split(".", 2)[1:] if module.startswith("blocks.") else ("", module)
        target = f"transformer.h.{number}.{names[part]}" if number else names[part]
        linear = "norm" not in part and number
        named[f"{target}.{what}"] = value.mT if linear and what == "weight" else value  # GPT-2's maps lie the other way
        if what == "weight" and not net.config["bias"] and (number or part == "norm"):
            named[f"{target}.bias"] = value.new_zeros(value.size(0))
    return named


def _generation_config(model: Model) -> dict[str, Any]:
    """The run's own settings of sampling; `generate()` of nothing begins, as ours, after a line's or a document's end."""
    sampling = model.sampling
    temperature = sampling.get("temperature", 1.0)
    greedy = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    if temperature:  # the stock values would filter
        greedy |= {"top_k": sampling.get("top_k") or 0, "top_p": sampling.get("top_p") or 1.0}
        if sampling.get("min_p"):
            greedy["min_p"] = sampling["min_p"]
    return {
        "bos_token_id": model.start,
        "eos_token_id": model.end,
        "pad_token_id": None,
        "max_new_tokens": sampling.get("max_new_tokens", 200),
        "repetition_penalty": sampling.get("repetition_penalty", 1.0),
        **greedy,
    }


def _tokenizer_config(model: Model) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    if architecture_of(model.net) not in WINDOWED:
        config["model_max_length"] = model.net.block_size
    return config


def card(model: Model, licence: str) -> str:
    """The model card: what it is, how it was made, how good it is, on what terms, how to run it."""
    net, ours, data = model.net, model.net.config, model.settings.get("data", {})
    corpus = Path(
        str(data.get("corpus", "a text that the checkpoint does not name"))
    ).name  # not whose folder it lay in
    rows = [
        f"| {label} | {model.figures[name]:.4f} |"
        for name, label in (
            ("val/nats_per_char", "nats per character"),
            ("val/bpc", "bits per character"),
            ("val/perplexity", "perplexity (per token)"),
        )
        if name in model.figures
    ]
    held_out = f"the last {100 * data.get('val_fraction', 0.1):.3g}% of the text, which was not trained on"
    if data.get("val_corpus"):
        held_out = f"a text of its own, {Path(str(data['val_corpus'])).name}"
    score = f"On {held_out}, at step {model.step}:"
    figures = "\n".join([score, "", "| | |", "|---|---|", *rows]) if rows else "These weights have not been validated."
    options = ", ".join(f"{k} {v}" for k, v in ours.items() if k not in ("vocab_size", "block_size"))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {licence}
tags:
- lmlight
---

# A small language model of {corpus}

{net.num_parameters:,} weights, trained with lmlight {lmlight.__version__} \
and exported as `{architecture_of(net)}`.

```python
from transformers import pipeline

print(pipeline("text-generation", ".")("ROMEO:")[0]["generated_text"])
```

## How good

{figures}

## How it was made

- Text: {corpus}.
- Tokenizer: {_describe(model.tokenizer)}.
- Context: {net.block_size} tokens. Longer texts: {_beyond(architecture_of(net))}
- Net: {options}.
- Steps: {model.step:,}.

## Licence

Of the weights: {licence}. Of the text they were trained on: its own{
        " (Shakespeare's works are in the public domain)" if corpus == "tinyshakespeare" else ""
    }.
"""


def _describe(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return f"SentencePiece, {tokenizer.vocab_size:,} pieces; every text comes back as it was"
    return f"{tokenizer.vocab_size:,} characters; a text with any other is refused"


def _beyond(architecture: str) -> str:
    if architecture in WINDOWED:
        return "the last so many are seen."
    return "not possible." if architecture == "gpt2" else "possible, but it was not trained for them."


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
