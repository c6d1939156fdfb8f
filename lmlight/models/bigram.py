"""Bigram: the lookup table from which everything starts; each token's row is the logits of what follows it."""

from __future__ import annotations

from torch import Tensor, nn

from lmlight.models.base import Net, init_arguments


class Bigram(Net):
    """A table of `vocab_size` × `vocab_size` logits.

    Args:
        vocab_size: V.
        block_size: the length it is fed; its predictions look at the last token alone.
    """

    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__(init_arguments(locals()))
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)  # (B, T, V)

    def flops_per_token(self) -> int:
        return 0  # a row is read, nothing is multiplied
