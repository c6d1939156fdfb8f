"""What a net must offer, and nothing else: training, generation and benchmarks know only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Weights = Literal["full", "int8"]
"""How matrices are read for a further token: as they are, or rounded to a quarter of the bytes."""


class Cache:
    """What a net keeps of the tokens that it has seen, so that each further one costs no more than itself.

    A net without a memory, such as the bigram table, needs no more than this.

    Attributes:
        lengths: tokens seen, for each row of the batch.
    """

    def __init__(self, rows: int) -> None:
        self.lengths = [0] * rows

    def replace(self, rows: list[int], other: Cache) -> None:
        """Puts all rows of `other`, a cache of the same net, in the place of these."""
        for row, length in zip(rows, other.lengths):
            self.lengths[row] = length


class Net(nn.Module, ABC):
    """Maps token ids to logits over the next token.

    Args:
        config: the arguments that make this net again, `type(net)(**net.config)`; plain values only.

    Attributes:
        vocab_size: V.
        block_size: the longest context it takes.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.vocab_size: int = config["vocab_size"]
        self.block_size: int = config["block_size"]

    @abstractmethod
    def forward(self, idx: Tensor) -> Tensor:
        """Logits for the token after each position.

        Args:
            idx: (B, T) token ids, T at most `block_size`.

        Returns:
            (B, T, V) logits; those at a position depend on it and the ones before alone.
        """

    @abstractmethod
    def extend(self, idx: Tensor, cache: Cache, lengths: list[int] | None = None) -> Tensor:
        """Logits for the token after the last one, for tokens that follow those in the cache, which sees them; no gradients.

        Args:
            idx: (B, T) token ids. Rows of the cache that are of different lengths are extended a token at a time.
            cache: from `new_cache`.
            lengths: into an empty cache, rows may be of different lengths: padded at the end, their own lengths here.

        Returns:
            (B, V), what `forward` gives at each row's last token, as long as a row is not longer than `block_size`.
        """

    def new_cache(self, rows: int, weights: Weights = "full") -> Cache:
        """An empty cache for so many rows; `weights` are for the tokens that come one at a time."""
        return Cache(rows)

    @property
    def num_parameters(self) -> int:
        """How many numbers training sets; those that are used twice (`tie`) count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def slides(self) -> bool:
        """Whether `extend` goes on beyond `block_size` tokens, forgetting the oldest."""
        return True

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of `targets` (B, T), in nats per token; a net that can do without all its logits may."""
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())

    @abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass at full context, a multiply-add as two.

        Training costs three times as much: backward is two products for each one of forward.
        """


def architecture_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """A net's arguments without the two sizes that the data decides: what a user chooses."""
    return {name: value for name, value in config.items() if name not in ("vocab_size", "block_size")}


def init_kwargs(local_variables: dict[str, Any]) -> dict[str, Any]:
    """An `__init__`'s own arguments out of its `locals()`, when called before anything else is assigned."""
    return {name: value for name, value in local_variables.items() if name not in ("self", "__class__")}
