"""Export to a Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` open without custom code."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlight.data.download import BUILTIN_CORPORA
from lmlight.data.hf_tokenizer import HFTokenizer
from lmlight.data.tokenizer import SentencePieceTokenizer
from lmlight.errors import UserError
from lmlight.export.architectures import match_architecture, named_weights
from lmlight.export.model import Model, require_extra
from lmlight.export.tokenizer import pre_tokenizer_name, tokenizer_json
from lmlight.generation import Sampling
from lmlight.models import Net, Transformer
from lmlight.version import __version__

# the files of an export
FILES = {"README.md", "model.safetensors", "tokenizer.model", "config.json", "generation_config.json"}
FILES |= {"tokenizer.json", "tokenizer_config.json"}


def write(model: Model, folder: Path, license: str) -> None:
    """Writes an export into an empty folder, with `license` in the model card.

    Raises:
        UserError: no architecture matches the network; the tokenizer is lossy; safetensors is not installed.
    """
    (safetensors,) = require_extra("hf", "safetensors.torch")
    architecture, tokenizer = match_architecture(model.net), model.tokenizer
    if architecture.model_type == "qwen2" and pre_tokenizer_name(tokenizer) != "qwen2":
        raise UserError(
            "transformers uses Qwen2's pre-tokenizer for any model of that architecture, but this checkpoint's tokenizer "
            "has a different one: export to gguf or onnx"
        )
    tokenizer_config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config["clean_up_tokenization_spaces"] = False
    if not isinstance(tokenizer, HFTokenizer):
        tokenizer_config["split_special_tokens"] = True  # text that spells a special token is ordinary text
    elif tokenizer.eos_id is not None:
        tokenizer_config["eos_token"] = tokenizer.id_to_piece(tokenizer.eos_id)
    if not architecture.sliding_window:
        tokenizer_config["model_max_length"] = model.net.block_size
    contents = {
        "config.json": config_json(model),
        "generation_config.json": generation_config_json(model),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config,
    }
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in contents.items()}
    for name, text in (texts | {"README.md": model_card(model, license)}).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    # safetensors' own save_file makes a file that only its owner can read
    (folder / "model.safetensors").write_bytes(safetensors.save(tensors(model.net), metadata={"format": "pt"}))
    if isinstance(tokenizer, SentencePieceTokenizer):  # for `lmlight import hf`
        (folder / "tokenizer.model").write_bytes(tokenizer.to_bytes())


def config_json(model: Model) -> dict[str, Any]:
    """The content of `config.json`, with every value whose default may change between versions of transformers."""
    architecture, net = match_architecture(model.net), model.net
    assert isinstance(net, Transformer)
    options, dtype = net.config, str(next(net.parameters()).dtype).removeprefix("torch.")
    activation = {"swiglu": "silu", "gelu": "gelu_pytorch_tanh", "relu2": "relu"}[options["mlp"]]
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": net.vocab_size,
        "torch_dtype": dtype,  # the name before transformers 5
        "dtype": dtype,
        "tie_word_embeddings": options["tie"],
        "bos_token_id": model.bos_id,
        "eos_token_id": model.tokenizer.eos_id,  # null too: the default id would be an ordinary token in our vocabulary
    }
    if architecture.model_type == "gpt2":
        return config | {
            **{name: options[name] for name in ("n_embd", "n_layer", "n_head")},
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), options["dropout"]),
            "n_positions": net.block_size,
            "n_inner": net.intermediate_size,
            "activation_function": activation,
            "layer_norm_epsilon": options["norm_eps"],
        }
    config |= {
        "attention_dropout": options["dropout"],
        "max_position_embeddings": net.block_size,
        "hidden_size": options["n_embd"],
        "intermediate_size": net.intermediate_size,
        "num_hidden_layers": options["n_layer"],
        "num_attention_heads": options["n_head"],
        "num_key_value_heads": net.n_kv_head,
        "head_dim": net.head_size,
        "hidden_act": activation,
        "rms_norm_eps": options["norm_eps"],
        "rope_theta": options["rope_theta"],  # the name before transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": options["rope_theta"]},
        "attention_bias": bool(options["bias"]),
        "mlp_bias": options["bias"] is True,
    }
    if architecture.sliding_window:
        config["sliding_window"] = net.block_size
    if architecture.model_type in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": True, "max_window_layers": 0}
        config["layer_types"] = ["sliding_attention"] * options["n_layer"]
    return config


def tensors(net: Net) -> dict[str, Tensor]:
    """The weights under their names in transformers; no two share memory, as safetensors requires."""
    architecture = match_architecture(net)
    assert isinstance(net, Transformer)
    found = {}
    for name, _, value in named_weights(net):
        if architecture.model_type == "gpt2" and ".h." in name and value.ndim == 2:
            value = value.mT  # GPT-2's Conv1D stores (in, out)
        found[name] = value.clone(memory_format=torch.contiguous_format)
    return found


def generation_config_json(model: Model) -> dict[str, Any]:
    """The content of `generation_config.json`: the run's own sampling settings."""
    sampling = Sampling(**model.sampling)
    config = {
        "bos_token_id": model.bos_id,
        "eos_token_id": model.tokenizer.eos_id,
        "repetition_penalty": sampling.repetition_penalty,
        "do_sample": sampling.temperature > 0,
    }
    if sampling.max_new_tokens:  # transformers refuses 0
        config["max_new_tokens"] = sampling.max_new_tokens
    if sampling.temperature > 0:
        # always written, because transformers filters by default (top_k 50)
        config |= {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
        if sampling.min_p:
            config["min_p"] = sampling.min_p
    return config


def model_card(model: Model, license: str) -> str:
    """The content of `README.md`."""
    corpus, data = model.corpus_name(), model.settings.get("data", {})
    prompt = BUILTIN_CORPORA[corpus].sample_prompt if corpus in BUILTIN_CORPORA else "The "
    origin = f"trained with lmlight for {model.step:,} steps on {corpus or 'an unknown text'}"
    if not (corpus or model.step):
        origin = f"imported and exported with lmlight {__version__}"
    held_out = f"the last {100 * data.get('val_fraction', 0.1):.3g}% of the text, which was not used for training"
    if val_corpus := model.corpus_name("val_corpus"):
        held_out = f"a separate text, {val_corpus}"
    if data.get("validate_on") == "tune":
        held_out = "a part of the text that was set aside for tuning"
    units = {"nats_per_char": "nats per character", "bpc": "bits per character", "perplexity": "perplexity per token"}
    metrics = {unit: model.metrics.get(f"val/{name}") for name, unit in units.items()}
    results = ", ".join(f"{value:.4f} {unit}" for unit, value in metrics.items() if value is not None)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {license}
tags:
- lmlight
---

# A small language model{f" trained on {corpus}" if corpus else ""}

{model.net.num_parameters:,} parameters (`{match_architecture(model.net).model_type}`), {origin}, \
with a context of {model.net.block_size} tokens. \
{f"On {held_out}: {results}." if results else "Not evaluated."} The license of the weights is {license}.

```python
from transformers import pipeline

print(pipeline("text-generation", ".")("{prompt}")[0]["generated_text"])
```
"""
