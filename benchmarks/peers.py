"""Networks of other projects, for comparison. They are downloaded from the package index, and lmlight does not use them.

nanoGPT and minGPT come from a wheel that contains both. litgpt comes from its own wheel; its dependencies are not installed,
so its `__init__` is skipped. Install transformers and x-transformers with `pip install 'lmlight[benchmarks]'`.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmlight import Transformer
from lmlight.data.cache import cache_dir
from lmlight.models import GPT2, LLAMA

NANOGPT = "lightning-gpt==0.1.1"  # contains nanoGPT and minGPT as of 2023
LITGPT = "litgpt==0.5.13"
# The CPU recipe of nanoGPT's README.
NANOGPT_CPU: dict[str, Any] = dict(
    block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000, dropout=0.0
)


@dataclass(frozen=True)
class Shape:
    """The sizes that all networks have in common."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int


Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps (B, T) inputs and targets to the mean loss."""


def fetched(wheel: str) -> Path:
    """Downloads and unpacks a wheel, and adds it to `sys.path`. Its dependencies are not installed."""
    place = cache_dir() / "peers" / wheel
    if not place.exists():
        beside = place.with_name(f".{place.name}")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", wheel, "-d", str(beside)]
        subprocess.run(command, check=True)
        for file in beside.glob("*.whl"):
            with zipfile.ZipFile(file) as archive:
                archive.extractall(beside)
        beside.rename(place)
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    return place


def _without_init(name: str, folder: Path) -> None:
    """Makes a package's modules importable without running its `__init__`."""
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def nanogpt_module() -> types.ModuleType:
    """nanoGPT's `model.py`."""
    _without_init("nanogpt", fetched(NANOGPT) / "nanogpt")
    return importlib.import_module("nanogpt.model")


def nanogpt(shape: Shape) -> tuple[nn.Module, Loss]:
    module = nanogpt_module()
    net = module.GPT(module.GPTConfig(**asdict(shape), dropout=0.0, bias=True))
    return net, lambda idx, targets: net(idx, targets)[1]


def mingpt(shape: Shape) -> tuple[nn.Module, Loss]:
    _without_init("mingpt", fetched(NANOGPT) / "mingpt")
    GPT = importlib.import_module("mingpt.model").GPT
    config = GPT.get_default_config()
    config.merge_from_dict({**asdict(shape), "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0})
    config.model_type = None
    net = GPT(config)
    return net, lambda idx, targets: net(idx, targets)[1]


def hf_gpt2(shape: Shape) -> tuple[nn.Module, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_positions=shape.block_size, vocab_size=shape.vocab_size)
    sizes |= dict(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    net = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    return net, lambda idx, targets: _cross_entropy(net(idx, use_cache=False).logits, targets)


def hf_llama(shape: Shape) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.n_embd,
        intermediate_size=8 * round(shape.n_embd / 3),
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        max_position_embeddings=shape.block_size,
    )
    net = LlamaForCausalLM(config)
    return net, lambda idx, targets: _cross_entropy(net(idx, use_cache=False).logits, targets)


def litgpt(shape: Shape) -> tuple[nn.Module, Loss]:
    folder = fetched(LITGPT) / "litgpt"
    _without_init("litgpt", folder)
    if "litgpt.scripts.convert_hf_checkpoint" not in sys.modules:  # model.py imports an unused function from it
        converter = types.ModuleType("litgpt.scripts.convert_hf_checkpoint")
        converter.qkv_reassemble = None  # type: ignore[attr-defined]  # a stub
        sys.modules["litgpt.scripts.convert_hf_checkpoint"] = converter
    model = importlib.import_module("litgpt.model")
    config = importlib.import_module("litgpt.config").Config(
        **asdict(shape),
        padded_vocab_size=shape.vocab_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=8 * round(shape.n_embd / 3),
    )
    net = model.GPT(config)
    return net, lambda idx, targets: _cross_entropy(net(idx), targets)


def x_transformers(shape: Shape) -> tuple[nn.Module, Loss]:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=shape.n_embd,
        depth=shape.n_layer,
        heads=shape.n_head,
        attn_dim_head=shape.n_embd // shape.n_head,
        attn_flash=True,
        rotary_pos_emb=True,
        use_rmsnorm=True,
        ff_swish=True,
        ff_glu=True,
        ff_mult=8 / 3,
        ff_no_bias=True,
    )
    net = TransformerWrapper(
        num_tokens=shape.vocab_size, max_seq_len=shape.block_size, attn_layers=layers, use_abs_pos_emb=False
    )
    return net, lambda idx, targets: _cross_entropy(net(idx), targets)


def ours(preset: dict[str, Any]) -> Callable[[Shape], tuple[nn.Module, Loss]]:
    def make(shape: Shape) -> tuple[nn.Module, Loss]:
        net = Transformer(**asdict(shape), **preset)
        return net, lambda idx, targets: _cross_entropy(net(idx), targets)

    return make


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


GPT2_SHAPED = {"lmlight": ours(GPT2), "nanoGPT": nanogpt, "minGPT": mingpt, "transformers GPT-2": hf_gpt2}
LLAMA_SHAPED = {
    "lmlight": ours(LLAMA),
    "transformers Llama": hf_llama,
    "litgpt": litgpt,
    "x-transformers": x_transformers,
}
