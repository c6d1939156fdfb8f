"""What a transformer keeps of the tokens that it has seen: their keys and values.

Axes: B rows, T new positions, S slots, H_kv heads of keys and values, D channels of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lmlight.models.base import Cache, Weights

if TYPE_CHECKING:
    from lmlight.models.decoding import OneToken


class KeyValueCache(Cache):
    """The keys and values of the last S tokens, block by block, in buffers that are made once.

    A row's token t lies in slot t mod S, so that the oldest is overwritten once S are there.

    Args:
        rows: B.
        n_layer: blocks.
        heads: H_kv.
        slots: S.
        head_size: D.
        like: gives the data type and the device.
        weights: how the net's are read for a further token.
    """

    def __init__(
        self,
        rows: int,
        n_layer: int,
        heads: int,
        slots: int,
        head_size: int,
        like: Tensor,
        weights: Weights = "full",
    ) -> None:
        super().__init__(rows)
        shape = (2 * n_layer, rows, heads, slots, head_size)
        self.buffers = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.slots, self.weights = slots, weights
        self.positions: slice | Tensor = slice(0, 0)
        self.causal, self.visible = False, cast("Tensor | None", None)
        self.step: OneToken | None = None  # made for the first token that is extended by, and kept with what it follows
        self.rotary = torch.empty(2, 0, head_size // 2)  # of positions beyond the net's own table, once there are any

    def place(self, count: int) -> None:
        """Decides where the next `count` tokens go and what they may see; the same in each block.

        Sets `positions`, of each token in its row, as a slice where all rows agree, else (B, 1); and `causal` and
        `visible`, which `attend` takes. The views of the buffers are made for all blocks at once, for each costs a call.
        """
        first, last = min(self.lengths), max(self.lengths)
        read = min(last + count, self.slots)
        self._seen = self.buffers.narrow(3, 0, read).unbind()  # keys and values, block by block: (B, H_kv, S, D)
        self.causal, self.visible = False, None
        if first == last:
            self.positions = slice(first, first + count)
            slot = first % self.slots
            assert slot + count <= self.slots, f"{count} tokens at once do not fit behind {first} in {self.slots} slots"
            self._new = self.buffers.narrow(3, slot, count).unbind()
            if count > 1:
                assert first < self.slots, "beyond the block, a token at a time"
                self.causal = first == 0
                if first:
                    ones = torch.ones(count, read, dtype=torch.bool, device=self.buffers.device)
                    self.visible = ones.tril(first)
        else:
            assert count == 1, "rows of different lengths are extended a token at a time"
            lengths = torch.tensor(self.lengths, device=self.buffers.device)
            self.positions, self._slots_of_rows = lengths[:, None], lengths % self.slots
            self.visible = (torch.arange(read, device=lengths.device) <= self.positions)[:, None, None]

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values (B, H_kv, T, D) of one block; all that the tokens may see, (B, H_kv, S, D)."""
        keys, values = self._seen[2 * layer], self._seen[2 * layer + 1]
        if isinstance(self.positions, slice):
            self._new[2 * layer].copy_(k)
            self._new[2 * layer + 1].copy_(v)
        else:
            rows = torch.arange(len(k), device=k.device)
            keys[rows, :, self._slots_of_rows] = k[:, :, 0].to(keys.dtype)
            values[rows, :, self._slots_of_rows] = v[:, :, 0].to(values.dtype)
        return keys, values

    def replace(self, rows: list[int], other: Cache) -> None:
        super().replace(rows, other)
        assert isinstance(other, KeyValueCache)
        self.buffers[:, rows] = other.buffers
