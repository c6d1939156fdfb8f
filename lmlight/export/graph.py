"""A net as a graph for other runtimes: what its `forward` computes, with no branch that depends on a size.

Axes: B rows, T new positions, P past ones, S = P + T, L blocks, H_kv heads of keys and values, D channels of a head, V
vocabulary.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmlight.errors import UserError
from lmlight.export.hf_tokenizer import tokenizer_json
from lmlight.export.model import Model
from lmlight.models import Net, Transformer
from lmlight.models.attention import attention_weights, repeat_heads, rotate
from lmlight.models.transformer import Block


class Graph(nn.Module):
    """The forward pass of any net: (B, T) ids to (B, T, V) logits."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = CachedGraph(net) if isinstance(net, Transformer) else net

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.net, CachedGraph):
            return self.net(ids, self.net.no_past(ids.size(0)))[0]
        return self.net(ids)


class CachedGraph(nn.Module):
    """The forward pass and the cached step of a transformer in one.

    Keys are kept as they are before rotary positions turn them, and turned by their place among those that are there. So a
    caller that drops the oldest of the past has a window that slides, as in our own cache, without counting positions.
    """

    def __init__(self, net: Transformer) -> None:
        super().__init__()
        self.net = net
        self.shape = (net.config["n_layer"], 2, net.n_kv_head, net.head_size)

    def no_past(self, rows: int, positions: int = 0) -> Tensor:
        """(L, 2, B, H_kv, P, D) of zeros: what comes before the first token has P 0."""
        n_layer, two, kv_heads, head_size = self.shape
        return self.net.head.weight.new_zeros(n_layer, two, rows, kv_heads, positions, head_size)

    def forward(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the past of what follows.

        Args:
            ids: (B, T) new tokens.
            past: (L, 2, B, H_kv, P, D) keys and values; P + T is at most `block_size`.

        Returns:
            (B, T, V) and (L, 2, B, H_kv, S, D).
        """
        net, before, count = self.net, past.size(4), ids.size(1)
        places = torch.arange(before + count, device=ids.device)  # (S,)
        new = torch.arange(count, device=ids.device) + before  # (T,)
        visible = places <= new[:, None]  # (T, S)
        x = net.embedding(ids)  # (B, T, C)
        if net.positions is not None:
            x = x + net.positions(new)
        present = []
        for number, block in enumerate(cast("list[Block]", net.blocks)):
            q, k, v = block.attention.project(block.attention_norm(x))
            k, v = torch.cat((past[number, 0], k), 2), torch.cat((past[number, 1], v), 2)  # (B, H_kv, S, D)
            present.append(torch.stack((k, v)))
            if net.rotary is not None:
                q, k = rotate(q, net.rotary[:, new]), rotate(k, net.rotary[:, places])
            group = q.size(1) // k.size(1)
            weights = attention_weights(q, repeat_heads(k, group), False, visible)  # (B, H, T, S)
            y = weights @ repeat_heads(v, group)
            x = x + block.attention.output(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        return net.head(net.norm(x)), torch.stack(present)


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
        "slides": model.net.slides,
    }
    with contextlib.suppress(UserError):  # lossy: no other engine repeats it
        # no special tokens, which the library would find in a text that has their names
        found["tokenizer.json"] = {**tokenizer_json(model.tokenizer), "added_tokens": []}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items()}
