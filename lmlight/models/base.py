"""The interface of a network: token ids in, logits out. Everything but `forward` is optional."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.models.kv_cache import KeyValueCache


class Net(nn.Module, ABC):
    """Base class of networks. A subclass implements `forward`.

    Args:
        config: the constructor's arguments, plain values only: `type(net)(**net.config)` builds the same network.

    Attributes:
        vocab_size: V.
        block_size: the longest context, in tokens.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.vocab_size: int = config["vocab_size"]
        self.block_size: int = config["block_size"]

    @abstractmethod
    def forward(self, idx: Tensor) -> Tensor:
        """Map token ids (B, T), T at most `block_size`, to the logits (B, T, V) of the tokens that follow each of them.

        The logits at a position must not depend on later ids.
        """

    def make_cache(self, batch_size: int) -> KeyValueCache | None:
        """Make an empty cache for `forward(idx, cache=..., last_only=...)`, as `Transformer` has it.

        If None, generation passes the whole context to `forward` for each new token.
        """
        return None

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of `targets` (B, T), in nats per token."""
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())

    def flops_per_token(self) -> int:
        """Count a token's floating-point operations in `forward`; the default counts all `nn.Linear` modules."""
        return 2 * sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))

    @property
    def num_parameters(self) -> int:
        """The number of trained weights; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def architecture_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that a user chooses: all but the two sizes that the data determines."""
    return {name: value for name, value in config.items() if name not in ("vocab_size", "block_size")}


def init_kwargs(local_variables: dict[str, Any]) -> dict[str, Any]:
    """Select an `__init__`'s arguments from its `locals()`, before it assigns any variable."""
    return {name: value for name, value in local_variables.items() if name not in ("self", "__class__")}
