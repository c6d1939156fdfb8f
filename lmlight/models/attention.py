"""Attention, from small to whole: rotary positions, the weights, what they gather, and the module.

The module does more than the decoder asks of it: without the causal mask it is an encoder's, with a `context` it is
cross-attention.

Axes: B rows, T positions, S positions attended to, C = n_embd channels, H = n_head heads, D = C / H.

Papers: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); rotary positions, Su et al. 2021
(https://arxiv.org/abs/2104.09864); grouped queries, Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245); query/key norm,
Henry et al. 2020 (https://arxiv.org/abs/2010.04245).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.models.kv_cache import KeyValueCache

NORM_EPS = 1e-5
ROPE_BASE = 10000.0
# Up to so many keys a CPU is faster without the fused kernel, which cuts short sequences into products too small to be fast
# (block 64, 4 heads of 32: a training step in 0.78 of the time); longer ones would need H T² numbers.
EXPLICIT_ATTENTION_MAX_KEYS = 256


def drop(x: Tensor, dropout: float, training: bool) -> Tensor:
    """`F.dropout`, which costs as much as a small product where there is nothing to drop."""
    return F.dropout(x, dropout) if training and dropout else x


def rotary_table(positions: int, head_size: int) -> Tensor:
    """Cosines and sines of the angles by which rotary positions turn each pair of channels.

    Returns:
        (2, positions, D / 2): cosines, then sines.
    """
    with torch.device("cpu"):  # Lightning builds networks on the accelerator, and MPS has no float64
        frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)  # (D / 2,)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
        table = torch.stack((angles.cos(), angles.sin())).float()
    return table.to(torch.get_default_device())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns channel i and channel i + D/2 by the angle of the position: (..., T, D) with a (2, T, D / 2) table."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_weights(q: Tensor, k: Tensor, causal: bool, visible: Tensor | None = None) -> Tensor:
    """How much each position attends to each other one: the four lines that the fused kernel computes.

    Args:
        q: (B, H, T, D) queries.
        k: (B, H, S, D) keys.
        causal: hide position s from position t < s.
        visible: boolean, broadcast to (B, H, T, S): hide what is false.

    Returns:
        (B, H, T, S); each row adds up to 1.
    """
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(dim=-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, visible: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """What each position gathers: (B, H, T, D) queries, (B, H_kv, S, D) keys and values to (B, H, T, D)."""
    group = q.size(1) // k.size(1)
    if group > 1 and q.size(2) == 1:  # the heads of a group ask the same keys: as well as positions might
        return attend(q.reshape(q.size(0), k.size(1), group, -1), k, v, False, visible, dropout).reshape(q.shape)
    k, v = repeat_heads(k, group), repeat_heads(v, group)
    one_query = q.size(0) == 1 == q.size(2)  # of which the kernel makes the most
    if q.device.type == "cpu" and k.size(-2) <= EXPLICIT_ATTENTION_MAX_KEYS and not one_query:
        weights = attention_weights(q, k, causal, visible)
        return (F.dropout(weights, dropout) if dropout else weights) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=causal)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """(B, H_kv, S, D) to (B, times H_kv, S, D): each head `times` times in a row, for the queries of its group."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


class Attention(nn.Module):
    """Multi-head attention: each position asks (query), each offers itself (key) and gives (value).

    Args:
        n_embd: C.
        n_head: H.
        n_kv_head: heads of keys and values, each shared by `n_head / n_kv_head` query heads.
        dropout: of attention weights and of the output, while training.
        bias: in the linear maps.
        qk_norm: RMSNorm of queries and keys, head by head.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = n_head, n_kv_head or n_head, n_embd // n_head
        self.dropout = dropout
        # queries, keys and values in one matrix: one large product is faster than three
        self.qkv = nn.Linear(n_embd, (n_head + 2 * self.n_kv_head) * self.head_size, bias=bias)
        self.output = nn.Linear(n_embd, n_embd, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_size, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_size, eps=NORM_EPS) if qk_norm else nn.Identity()

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, H, T, D), keys and values (B, H_kv, T, D) of each position."""
        x = self.qkv(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return torch.split(x, [self.n_head, self.n_kv_head, self.n_kv_head], dim=1)

    def project(
        self, x: Tensor, context: Tensor | None = None, rotary: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, H_kv, S, D) as they enter the attention."""
        q, k, v = self._heads(x)
        if context is not None:
            _, k, v = self._heads(context)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rotary: Tensor | None = None,
        causal: bool = True,
        cache: tuple[KeyValueCache, int] | None = None,
    ) -> Tensor:
        """What each position of `x` gathers.

        Args:
            x: (B, T, C).
            context: (B, S, C) attended to instead of `x` itself (cross-attention).
            rotary: `rotary_table` of the T positions, for self-attention.
            causal: no position sees a later one.
            cache: with the block's number, where earlier positions are kept; it knows what is causal.

        Returns:
            (B, T, C).
        """
        q, k, v = self.project(x, context, rotary)
        visible = None
        if cache is not None:
            memory, layer = cache
            k, v = memory.put(layer, k, v)
            causal, visible = memory.causal, memory.visible
        y = attend(q, k, v, causal, visible, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = self.output(y.transpose(1, 2).flatten(2))
        return drop(y, self.dropout, self.training)
