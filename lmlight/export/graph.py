"""A network as a graph for other runtimes: its `forward`, with a cache that has no branch that depends on a size.

Axes: B batch, T new positions, P past ones, S = P + T, L blocks, H_kv heads of keys and values, D channels of a head, V
vocabulary.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from lmlight.errors import UserError
from lmlight.export.hf_tokenizer import tokenizer_json
from lmlight.export.model import Model
from lmlight.models import Net, Transformer
from lmlight.models.kv_cache import Cache
from lmlight.models.rope import apply_rope


class Graph(nn.Module):
    """The forward pass of any network: (B, T) ids to (B, T, V) logits."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = CachedGraph(net) if isinstance(net, Transformer) else net

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.net, CachedGraph):
            return self.net(ids, self.net.no_past(ids.size(0)))[0]
        return self.net(ids)


class CachedGraph(nn.Module):
    """The forward pass and the cached step of a transformer in one graph."""

    def __init__(self, net: Transformer) -> None:
        super().__init__()
        self.net = net
        self.shape = (net.config["n_layer"], 2, net.n_kv_head, net.head_size)

    def no_past(self, rows: int, positions: int = 0) -> Tensor:
        """(L, 2, B, H_kv, P, D) of zeros; P is 0 before the first token."""
        n_layer, two, kv_heads, head_size = self.shape
        return self.net.head.weight.new_zeros(n_layer, two, rows, kv_heads, positions, head_size)

    def forward(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits, and the past of the tokens that follow.

        Args:
            ids: (B, T) new tokens.
            past: (L, 2, B, H_kv, P, D) keys and values; P + T is at most `block_size`.

        Returns:
            (B, T, V) and (L, 2, B, H_kv, S, D).
        """
        cache = ConcatCache(past, self.net.rope)
        logits = self.net(ids, cache)
        return logits, torch.stack(cache.present)


class ConcatCache(Cache):
    """A cache without state or branches: new keys and values are concatenated to a past that the caller holds.

    The past holds keys before RoPE, which is applied by their place in the past. So a caller that drops the oldest has a
    sliding window without counting positions.

    Args:
        past: (L, 2, B, H_kv, P, D).
        rope: the network's RoPE table, if it has one.

    Attributes:
        present: for each layer so far, keys and values (2, B, H_kv, S, D).
    """

    def __init__(self, past: Tensor, rope: Tensor | None) -> None:
        # with maps, attention is explicit and has no branch on the number of keys
        super().__init__(is_causal=False, attention_maps=[])
        self.past, self.rope, self.present = past, rope, list[Tensor]()

    def advance(self, count: int) -> None:
        keys = torch.arange(self.past.size(4) + count, device=self.past.device)  # (S,)
        self.input_pos = torch.arange(count, device=self.past.device) + self.past.size(4)  # (T,)
        self.attn_mask = keys <= self.input_pos[:, None]  # (T, S)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.past[layer]
        v = torch.cat((past_v, v), 2)
        if self.rope is None:
            k = plain_k = torch.cat((past_k, k), 2)
        else:
            cos, sin = self.rope[:, self.input_pos]
            plain_k = torch.cat((past_k, apply_rope(k, torch.stack((cos, -sin)))), 2)  # rotated back
            k = torch.cat((apply_rope(past_k, self.rope[:, torch.arange(past_k.size(2))]), k), 2)
        self.present.append(torch.stack((plain_k, v)))
        return k, v


def labels(model: Model) -> dict[str, str]:
    """What travels beside a graph, as JSON.

    - `vocab_size`, `block_size`.
    - `start`: the id that an empty text follows, or null; `end`: the id at which a text ends, or null.
    - `slides`: whether the oldest of the past may be left out beyond the block; else positions end there.
    - `tokenizer.json`, which Hugging Face's `tokenizers` runs, where the tokenizer is lossless.
    """
    found: dict[str, Any] = {
        "vocab_size": model.net.vocab_size,
        "block_size": model.net.block_size,
        "start": model.start,
        "end": model.end,
        "slides": not (isinstance(model.net, Transformer) and model.net.positions is not None),
    }
    with contextlib.suppress(UserError):  # lossy: no other engine repeats it
        # no special tokens, which the library would find in a text that has their names
        found["tokenizer.json"] = {**tokenizer_json(model.tokenizer), "added_tokens": []}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items()}
