"""Attention, from small to whole: the attention weights, the product, and the module.

- Queries, keys and values come from one matrix, since one large product is faster than three.
- Heads of keys and values can be shared by groups of query heads; queries and keys can be normalized.
- A cache decides what new tokens attend to. Without one, `causal` and `kv_input` also give an encoder's attention and
  cross-attention.

Axes: B batch, T positions, S positions attended to, C = n_embd channels, H = n_head heads, H_kv key/value heads, D = C / H.

Papers: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); grouped queries, Ainslie et al. 2023
(https://arxiv.org/abs/2305.13245); query/key norm, Henry et al. 2020 (https://arxiv.org/abs/2010.04245).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.models.kv_cache import Cache
from lmlight.models.rope import apply_rope

# The fused CPU kernel splits short sequences into small, slow products: at block size 64 with 4 heads of 32, a training step
# without it takes 0.78 of the time. For longer sequences, the H T² weights would cost too much memory.
EXPLICIT_ATTENTION_MAX_KEYS = 256


class RMSNorm(nn.RMSNorm):
    """RMSNorm that keeps the data type of its input (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

    `nn.RMSNorm` warns and leaves the fused kernel if the input is bfloat16 and its weight float32, as under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def apply_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Apply `F.dropout`, which costs as much as a small matrix product even if `p` is 0."""
    return F.dropout(x, p) if training and p else x


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """Repeat each key/value head for the query heads of its group: (B, H_kv, S, D) to (B, times H_kv, S, D)."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def attention_weights(q: Tensor, k: Tensor, causal: bool, attn_mask: Tensor | None = None) -> Tensor:
    """Compute how much each position attends to each other one.

    Args:
        q: (B, H, T, D) queries.
        k: (B, H, S, D) keys.
        causal: mask position s for position t < s.
        attn_mask: boolean, broadcast to (B, H, T, S); False masks.

    Returns:
        (B, H, T, S); each row sums to 1.
    """
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(dim=-1)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    maps: list[Tensor] | None = None,
) -> Tensor:
    """Average the values by attention weight, with or without torch's fused kernel.

    Args:
        q: (B, H, T, D) queries.
        k: (B, H_kv, S, D) keys.
        v: (B, H_kv, S, D) values.
        causal: see `attention_weights`.
        attn_mask: see `attention_weights`.
        dropout_p: probability of dropping an attention weight.
        maps: a list to append the attention weights (B, H, T, S) to.

    Returns:
        (B, H, T, D).
    """
    group = q.size(1) // k.size(1)
    if maps is None and group > 1 and q.size(2) == 1:
        # a single query position: fold the heads of a group into the sequence axis
        folded = q.reshape(q.size(0), k.size(1), group, -1)
        return scaled_dot_product_attention(folded, k, v, False, attn_mask, dropout_p).reshape(q.shape)
    k, v = repeat_kv(k, group), repeat_kv(v, group)
    short = q.device.type == "cpu" and k.size(-2) <= EXPLICIT_ATTENTION_MAX_KEYS
    # the fused kernel is fast for a single query of a single row
    if maps is not None or (short and (q.size(0) > 1 or q.size(2) > 1)):
        weights = attention_weights(q, k, causal, attn_mask)
        if maps is not None:
            maps.append(weights)
        return (F.dropout(weights, dropout_p) if dropout_p else weights) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=causal)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        n_embd: C.
        n_head: H.
        n_kv_head: H_kv; each head is shared by `n_head / n_kv_head` query heads. None means `n_head`.
        dropout: probability of dropping attention weights and outputs while training.
        bias: whether the linear layers have a bias.
        qk_norm: whether to apply RMSNorm to the queries and keys of each head.
        norm_eps: epsilon of that norm.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = n_head, n_kv_head or n_head, n_embd // n_head
        self.dropout = dropout
        self.qkv = nn.Linear(n_embd, (n_head + 2 * self.n_kv_head) * self.head_size, bias=bias)
        self.output = nn.Linear(n_embd, n_embd, bias=bias)
        self.q_norm = RMSNorm(self.head_size, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, eps=norm_eps) if qk_norm else nn.Identity()

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.qkv(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        return torch.split(x, [self.n_head, self.n_kv_head, self.n_kv_head], dim=1)

    def project(
        self, x: Tensor, kv_input: Tensor | None = None, rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries (B, H, T, D), keys and values (B, H_kv, S, D); see `forward`."""
        q, k, v = self._heads(x)
        if kv_input is not None:
            _, k, v = self._heads(kv_input)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        kv_input: Tensor | None = None,
        rope: Tensor | None = None,
        causal: bool = True,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend from each position of `x`.

        Args:
            x: (B, T, C).
            kv_input: (B, S, C) to attend to instead of `x` (cross-attention).
            rope: `rope_cache` of the T positions, for self-attention.
            causal: no position attends to a later one.
            cache: holds earlier positions; its mask replaces `causal`.
            layer: index of this layer in the cache.

        Returns:
            (B, T, C).
        """
        q, k, v = self.project(x, kv_input, rope)
        attn_mask, maps = None, None
        if cache is not None:
            k, v = cache.update(layer, k, v)
            causal, attn_mask, maps = cache.is_causal, cache.attn_mask, cache.attention_maps
        dropout_p = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, causal, attn_mask, dropout_p, maps)  # (B, H, T, D)
        return apply_dropout(self.output(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
