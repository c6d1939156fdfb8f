"""Attention, bottom up: the weights, the weighted sum, the module.

A `Cache` has the attention mask and the positions of new tokens. With `causal=False`, the module is an encoder's
attention; with `kv_input` as well, cross-attention.

Axes: B batch, T positions, S positions attended to, C = n_embd channels, H heads, H_kv key/value heads, D channels of a
head.

Papers: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); grouped queries, Ainslie et al. 2023
(https://arxiv.org/abs/2305.13245); query/key norm, Henry et al. 2020 (https://arxiv.org/abs/2010.04245).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.models.kv_cache import Cache
from lmlight.models.rope import apply_rope

# The fused CPU kernel splits short sequences into small, slow products: at block size 64 with 4 heads of 32, a training
# step takes 22% less time without it. For longer sequences, the H T² weights would cost too much memory.
EXPLICIT_ATTENTION_MAX_KEYS = 256


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` that stays on the fused kernel, without a warning, if autocast makes its input bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def apply_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Apply dropout. Skip `F.dropout` if `p` is 0, as it would still cost as much as a small matrix product."""
    return F.dropout(x, p) if training and p else x


def attention_weights(q: Tensor, k: Tensor, causal: bool, attn_mask: Tensor | None = None) -> Tensor:
    """Compute how much each query position attends to each key position.

    Args:
        q: (B, H, T, D) queries, or (B, T, D) without heads.
        k: (B, H, S, D) keys, with the same leading axes as `q`.
        causal: mask positions s > t.
        attn_mask: boolean, broadcast to (B, H, T, S); False masks.

    Returns:
        (B, H, T, S); each row sums to 1.
    """
    # `baddbmm` also scales and adds the causal mask, which saves two passes over the scores
    mask = q.new_zeros(q.size(-2), k.size(-2))
    if causal:
        mask = mask.fill_(-math.inf).triu(1)
    scores = torch.baddbmm(mask, q.flatten(0, -3), k.flatten(0, -3).mT, alpha=1 / math.sqrt(q.size(-1)))
    scores = scores.view(*q.shape[:-2], *scores.shape[1:])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(dim=-1)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, cache: Cache, dropout: float = 0.0) -> Tensor:
    """Attend to keys and values (B, H_kv, S, D) with queries (B, H, T, D) and the cache's mask; returns (B, H, T, D)."""
    group, maps = q.size(1) // k.size(1), cache.attention_maps
    if group > 1 and maps is None and not cache.is_causal and q.size(2) == 1:
        # with a single query position, fold grouped heads into the sequence dimension
        folded = q.reshape(q.size(0), k.size(1), group, -1)
        return scaled_dot_product_attention(folded, k, v, cache, dropout).reshape(q.shape)
    k, v = repeat_kv(k, group), repeat_kv(v, group)
    if maps is not None:  # before the rest: exported graphs set it, and must not branch on the number of keys
        explicit = True
    elif q.device.type == "cpu":  # one query of one row is faster with the fused kernel
        explicit = k.size(-2) <= EXPLICIT_ATTENTION_MAX_KEYS and (q.size(0) > 1 or q.size(2) > 1)
    else:  # for few queries with a mask, the fused CUDA kernel occupies few multiprocessors
        explicit = q.size(2) < 16 and cache.attn_mask is not None
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v, cache.attn_mask, dropout, cache.is_causal)
    weights = attention_weights(q, k, cache.is_causal, cache.attn_mask)
    if maps is not None:
        maps.append(weights)
    return apply_dropout(weights, dropout, training=True) @ v


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """Repeat key/value heads for the query heads of their group: (B, H_kv, S, D) to (B, times H_kv, S, D)."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        n_embd: C.
        n_head: H.
        n_kv_head: H_kv, which divides H; None means H.
        dropout: dropout probability of attention weights and outputs.
        bias: use a bias in both linear layers; `qkv`: in the query/key/value projection only.
        qk_norm: apply RMSNorm to the queries and keys of each head.
        norm_eps: epsilon of that norm.
        head_size: D; None means C / H.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool | Literal["qkv"] = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        head_size: int | None = None,
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = n_head, n_kv_head or n_head, head_size or n_embd // n_head
        self.dropout = dropout
        # one matrix, since one large product is faster than three
        self.qkv = nn.Linear(n_embd, (n_head + 2 * self.n_kv_head) * self.head_size, bias=bool(bias))
        self.output = nn.Linear(n_head * self.head_size, n_embd, bias=bias is True)
        self.q_norm = RMSNorm(self.head_size, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, eps=norm_eps) if qk_norm else nn.Identity()

    def project(self, x: Tensor, kv_input: Tensor | None = None, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute queries (B, H, T, D), keys and values (B, H_kv, S, D); see `forward`."""

        def heads(x: Tensor) -> tuple[Tensor, ...]:
            x = self.qkv(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
            return torch.split(x, [self.n_head, self.n_kv_head, self.n_kv_head], dim=1)

        q, k, v = heads(x)
        if kv_input is not None:
            _, k, v = heads(kv_input)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rope is None else (apply_rope(q, rope), apply_rope(k, rope), v)

    def forward(
        self,
        x: Tensor,
        kv_input: Tensor | None = None,
        rope: Tensor | None = None,
        causal: bool = True,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Compute self-attention or, with `kv_input`, cross-attention.

        Args:
            x: (B, T, C).
            kv_input: (B, S, C) to attend to instead of `x` (cross-attention).
            rope: (2, T, D / 2), from `rope_cache`, or (2, B, 1, T, D / 2) if rows differ.
            causal: attend to no later position.
            cache: replaces `causal`; None keeps nothing.
            layer: index of this layer in the cache.

        Returns:
            (B, T, C).
        """
        cache = Cache(causal) if cache is None else cache
        q, k, v = self.project(x, kv_input, rope)
        k, v = cache.update(layer, k, v)
        y = scaled_dot_product_attention(q, k, v, cache, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return apply_dropout(self.output(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
