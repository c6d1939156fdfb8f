"""Caches: what attention keeps from earlier tokens, and which of it new tokens may attend to.

- `NoCache`: nothing is kept; training and scoring run whole sequences.
- `KeyValueCache`: keys and values in preallocated buffers; generation appends one token at a time.

Axes: B batch, T new positions, S positions attended to, H_kv key/value heads, D channels of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lmlight.models.rope import rope_cache


class Cache(ABC):
    """The interface between a transformer's forward pass and its cache.

    A forward pass calls `advance` once, then `update` in each layer.

    Attributes:
        input_pos: positions of the new tokens: a slice if all rows agree, else a tensor (T,) or (B, 1).
        is_causal: whether new tokens attend causally to each other and to nothing else.
        attn_mask: boolean mask, broadcast to (B, H, T, S), of what new tokens attend to; None for all.
        rope: table that replaces the network's own, for positions beyond `block_size`.
        attention_maps: if a list, each layer appends its attention weights (B, H, T, S).
    """

    input_pos: slice | Tensor
    is_causal = True
    attn_mask: Tensor | None = None
    rope: Tensor | None = None
    attention_maps: list[Tensor] | None = None

    @abstractmethod
    def advance(self, count: int) -> None:
        """Set the attributes for the next `count` tokens of each row."""

    @abstractmethod
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values (B, H_kv, T, D); return all to attend to, (B, H_kv, S, D)."""


class NoCache(Cache):
    """Keeps nothing. Can record the attention weights of all layers.

    Args:
        attention_maps: an empty list to record into.
    """

    def __init__(self, attention_maps: list[Tensor] | None = None) -> None:
        self.attention_maps = attention_maps

    def advance(self, count: int) -> None:
        self.input_pos = slice(0, count)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


class KeyValueCache(Cache):
    """Keys and values of the last `max_length` tokens, in buffers that are allocated once. Holds no gradients.

    Token t of a row occupies slot t mod `max_length`, so the oldest is overwritten when the buffers are full.

    Args:
        batch_size: B.
        n_layer: number of layers.
        n_head: H_kv.
        max_length: slots.
        head_size: D.
        like: a tensor of the data type and device to use.
        rope_theta: the network's RoPE base; None if it has learned positions, which end at `max_length`.

    Attributes:
        lengths: tokens seen, per row.
        supports_sliding_window: whether the cache continues beyond `max_length` tokens.
    """

    def __init__(
        self,
        batch_size: int,
        n_layer: int,
        n_head: int,
        max_length: int,
        head_size: int,
        like: Tensor,
        rope_theta: float | None,
    ) -> None:
        shape = (2 * n_layer, batch_size, n_head, max_length, head_size)
        self.buffers = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.max_length, self.rope_theta = max_length, rope_theta
        self.supports_sliding_window = rope_theta is not None
        self.lengths = [0] * batch_size
        self._row_pos: Tensor | None = None  # (B, 1), the last `input_pos` of rows that differ in length

    def advance(self, count: int) -> None:
        """Reserve slots for the next `count` tokens of each row.

        Rows of different lengths advance one token at a time, and so do rows at or beyond `max_length`.
        """
        first, end = min(self.lengths), max(self.lengths) + count
        size, device = min(end, self.max_length), self.buffers.device
        self._kept = self.buffers.narrow(3, 0, size).unbind()  # keys and values by layer: (B, H_kv, S, D)
        self.is_causal, self.attn_mask = False, None
        if first + count == end:
            self.input_pos = slice(first, end)
            slot = first % self.max_length
            assert count == 1 or end <= self.max_length, f"{count} tokens after {first}, max_length {self.max_length}"
            self._new = self.buffers.narrow(3, slot, count).unbind()
            if count > 1 and first:
                self.attn_mask = torch.ones(count, size, dtype=torch.bool, device=device).tril(first)
            self.is_causal = count > 1 and not first
        else:
            assert count == 1, f"rows differ in length and advance by {count}"
            # count on the device, since an upload synchronizes
            pos = torch.tensor(self.lengths, device=device)[:, None] if self._row_pos is None else self._row_pos + 1
            self.input_pos = self._row_pos = pos  # (B, 1)
            self._new_slots = torch.arange(len(pos), device=device), pos[:, 0] % self.max_length
            self.attn_mask = (torch.arange(size, device=device) <= pos)[:, None, None]  # (B, 1, 1, S)
        if self.rope_theta is not None and end > max(self.max_length, 0 if self.rope is None else self.rope.size(1)):
            self.rope = rope_cache(2 * end, self.buffers.size(-1), self.rope_theta).to(self.buffers)
        self.lengths = [length + count for length in self.lengths]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._kept[2 * layer], self._kept[2 * layer + 1]
        if isinstance(self.input_pos, slice):
            self._new[2 * layer].copy_(k)
            self._new[2 * layer + 1].copy_(v)
        else:
            rows, slots = self._new_slots
            keys[rows, :, slots] = k[:, :, 0].to(keys.dtype)
            values[rows, :, slots] = v[:, :, 0].to(values.dtype)
        return keys, values

    def replace(self, rows: list[int], other: KeyValueCache) -> None:
        """Replace these rows by the rows of `other`, a cache of the same network."""
        self.buffers[:, rows] = other.buffers
        replaced = dict(zip(rows, other.lengths))
        self.set_lengths([replaced.get(row, length) for row, length in enumerate(self.lengths)])

    def set_lengths(self, lengths: list[int]) -> None:
        """Truncate each row to its length: a prompt's padding does not count."""
        self.lengths, self._row_pos = lengths, None
