"""The interface of a network: token ids in, logits out. Everything but `forward` is optional."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.models.kv_cache import KeyValueCache


class Net(nn.Module, ABC):
    """Base class of networks, which map token ids to logits for the next token. Subclasses implement `forward`.

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
        """Compute the logits for the token after each position.

        Args:
            idx: (B, T) token ids, T at most `block_size`.

        Returns:
            (B, T, V) logits. Those at a position depend only on the ids up to it.
        """

    def make_cache(self, batch_size: int) -> KeyValueCache | None:
        """Make an empty cache for generation, or return None if the network has none.

        A network that returns one must also take `forward(idx, cache=cache, last=last)`; see `Transformer.forward`.
        Without one, generation runs the whole context through `forward` for each new token.
        """
        return None

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of `targets` (B, T), in nats per token."""
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())

    def flops_per_token(self) -> int:
        """Count the floating-point operations of one token's forward pass, a multiply-add as two.

        Training costs three times as many. The default counts the products of all `nn.Linear` modules.
        """
        return 2 * sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))

    @property
    def num_parameters(self) -> int:
        """The number of trained weights; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def architecture_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that a user chooses: all but the two sizes that the data determines."""
    return {name: value for name, value in config.items() if name not in ("vocab_size", "block_size")}


def init_kwargs(local_variables: dict[str, Any]) -> dict[str, Any]:
    """Extract an `__init__`'s arguments from its `locals()`. Call it before assigning any variable."""
    return {name: value for name, value in local_variables.items() if name not in ("self", "__class__")}
