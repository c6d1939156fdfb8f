"""Caches: the state kept from earlier tokens, and the attention mask and positions of new ones.

Axes: B batch, T new tokens, S slots, H_kv key/value heads, D channels of a head.
"""

import torch
from torch import Tensor

from lmlight.models.rope import rope_cache


class Cache:
    """The state that forward passes keep from earlier tokens. This base class keeps nothing.

    A network without attention can subclass it to keep its own state (`Net.make_cache`). Generation calls
    `set_padding` once, then `forward(idx, cache=cache)` with the prompts and with each further token.

    Args:
        is_causal: whether a position attends to no later position.
        attention_maps: a list to which each layer appends its attention weights (B, H, T, S).

    Attributes:
        padding: number of tokens at the start of each row to ignore.
        last_only: whether `forward` may compute the logits of the last position only, (B, 1, V).
        supports_sliding_window: whether rows may grow beyond `block_size`. If not, generation starts over with
            the last half of a block whenever a row is full.
        input_pos: positions of the new tokens: a slice, or a tensor (T,) or (B, T).
        attn_mask: boolean, broadcast to (B, H, T, S): what new tokens attend to; None leaves this to `is_causal`.
        rope: table that replaces the network's own.
    """

    padding: list[int]
    last_only = False
    supports_sliding_window = True
    input_pos: slice | Tensor
    attn_mask: Tensor | None = None
    rope: Tensor | None = None

    def __init__(self, is_causal: bool = True, attention_maps: list[Tensor] | None = None) -> None:
        self.is_causal, self.attention_maps = is_causal, attention_maps

    def set_padding(self, padding: list[int]) -> None:
        """Ignore this many tokens at the start of each row."""
        self.padding = padding

    def advance(self, count: int) -> None:
        """Set the attributes for the next `count` tokens of each row."""
        self.input_pos = slice(0, count)

    def rope_rows(self, table: Tensor) -> Tensor:
        """Look up the new tokens' positions in a RoPE table: (2, T, D / 2), or (2, B, T, D / 2) if rows differ."""
        return (table if self.rope is None else self.rope)[:, self.input_pos]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values (B, H_kv, T, D); return all of them, (B, H_kv, S, D)."""
        return k, v


class KeyValueCache(Cache):
    """Keys and values of the last `max_length` tokens, in buffers that are allocated once. For inference only.

    Token t is in slot t mod `max_length`. Shorter rows are padded at the start, so all rows fill the same slots.

    Args:
        shape: (B, layers, H_kv, max_length, D).
        like: a tensor with the data type and device to use.
        rope_theta: the network's RoPE base; None for learned positions, which end at `max_length`.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], like: Tensor, rope_theta: float | None) -> None:
        super().__init__()
        batch_size, n_layer, n_head, self.max_length, head_size = shape
        shape = 2 * n_layer, batch_size, n_head, self.max_length, head_size
        self.buffers = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.rope_theta, self.supports_sliding_window = rope_theta, rope_theta is not None
        self.length = 0  # of each row, with its padding
        self.set_padding([0] * batch_size)

    def set_padding(self, padding: list[int]) -> None:
        self.padding, self._padding = padding, torch.tensor(padding, device=self.buffers.device)[:, None, None]

    def advance(self, count: int) -> None:
        first, end, device = self.length, self.length + count, self.buffers.device
        assert count == 1 or end <= self.max_length, f"{count} tokens after {first}, max_length {self.max_length}"
        self.length, size = end, min(end, self.max_length)
        self._kept = self.buffers.narrow(3, 0, size).unbind()  # keys and values by layer: (B, H_kv, S, D)
        self._new = self.buffers.narrow(3, first % self.max_length, count).unbind()
        self.input_pos, self.is_causal, self.attn_mask = slice(first, end), count > 1, None
        if any(self.padding) or (count > 1 and first):
            new = torch.arange(first, end, device=device)[:, None]  # (T, 1)
            kept = end - 1 - (end - 1 - torch.arange(size, device=device)) % self.max_length  # (S,): token in each slot
            # padding attends to padding, since a softmax over nothing is NaN
            mask = (kept <= new) & ((kept >= self._padding) | (new < self._padding))  # (B, T, S)
            self.attn_mask = mask[:, None]  # (B, 1, T, S)
            self.input_pos, self.is_causal = (new - self._padding).clamp(min=0)[..., 0], False  # (B, T)
        if self.rope_theta is not None and end > max(self.max_length, 0 if self.rope is None else self.rope.size(1)):
            self.rope = rope_cache(2 * end, self.buffers.size(-1), self.rope_theta).to(self.buffers)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self._new[2 * layer].copy_(k)
        self._new[2 * layer + 1].copy_(v)
        return self._kept[2 * layer], self._kept[2 * layer + 1]
