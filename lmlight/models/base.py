"""What a net must offer, and nothing else: training, generation and benchmarks know only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


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

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of `targets` (B, T), in nats per token; a net that can do without all its logits may."""
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())

    @abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass at full context, a multiply-add as two.

        Training costs three times as much: backward is two products for each one of forward.
        """


def chosen(config: dict[str, Any]) -> dict[str, Any]:
    """A net's arguments without the two sizes that the data decides: what a user chooses."""
    return {name: value for name, value in config.items() if name not in ("vocab_size", "block_size")}


def init_arguments(local_variables: dict[str, Any]) -> dict[str, Any]:
    """An `__init__`'s own arguments out of its `locals()`, when called before anything else is assigned."""
    return {name: value for name, value in local_variables.items() if name not in ("self", "__class__")}
