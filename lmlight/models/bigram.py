"""Bigram: the lookup table from which everything starts; each token's row is the logits of what follows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmlight.models.base import Cache, Net, init_kwargs


class Bigram(Net):
    """A table of `vocab_size` × `vocab_size` logits.

    Args:
        vocab_size: V.
        block_size: the length it is fed; its predictions look at the last token alone.
    """

    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__(init_kwargs(locals()))
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)  # (B, T, V)

    @torch.no_grad()
    def extend(self, idx: Tensor, cache: Cache, lengths: list[int] | None = None) -> Tensor:
        lengths = lengths or [idx.size(1)] * len(idx)
        cache.lengths = [before + more for before, more in zip(cache.lengths, lengths)]
        last = torch.tensor(lengths, device=idx.device)[:, None] - 1
        return self.table(idx.gather(1, last)[:, 0])  # (B, V)

    def flops_per_token(self) -> int:
        return 0  # a row is read, nothing is multiplied
