"""The bigram table, the simplest language model: the logits depend on the last token only."""

from torch import Tensor, nn

from lmlight.models.base import Net


class Bigram(Net):
    """A table of `vocab_size` × `vocab_size` logits.

    Args:
        vocab_size: V.
        block_size: length of the training windows. Predictions depend on the last token only.
    """

    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)  # (B, T, V)
