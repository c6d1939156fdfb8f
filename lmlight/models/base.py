"""The interface of a network: token ids in, logits out. Everything but `forward` is optional."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.errors import UserError
from lmlight.models.kv_cache import Cache
from lmlight.user_code import full_name

SIZES = ("vocab_size", "block_size")


class Net(nn.Module, ABC):
    """Base class of networks. A subclass implements `forward`.

    The first two arguments of its constructor are `vocab_size` and `block_size`, which come from the data module. The others
    can be passed by name and are plain values: numbers, strings, booleans, None, and lists or dicts of them.

    Attributes:
        config: The constructor's arguments, recorded automatically: `type(net)(**net.config)` builds the same network.
            Cannot be set.
        class_name: Full name of the class, under which checkpoints store it.
        vocab_size: V.
        block_size: The longest context, in tokens.
    """

    _config: dict[str, Any]
    class_name: str
    vocab_size: int
    block_size: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Net:
        net = super().__new__(cls)
        if args or kwargs:  # both are empty when a network is unpickled or copied
            net._config = _arguments(cls, args, kwargs)
            net.class_name = full_name(cls)
            net.vocab_size, net.block_size = net.config["vocab_size"], net.config["block_size"]
        return net

    @property
    def config(self) -> dict[str, Any]:  # without a setter: checkpoints need it as it is
        return self._config

    @abstractmethod
    def forward(self, idx: Tensor) -> Tensor:
        """Map token ids (B, T), with T at most `block_size`, to the logits (B, T, V) of each next token.

        The logits at a position must not depend on later ids.
        """

    def make_cache(self, batch_size: int) -> Cache | None:
        """Make an empty cache. If a subclass overrides this, its `forward` must also take `cache=None`.

        If this returns None, generation passes the whole context to `forward` for each new token.
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
        """The number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def architecture_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments of the architecture: all but the two sizes, which come from the data module."""
    return {name: value for name, value in config.items() if name not in SIZES}


def _arguments(cls: type[Net], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name, defaults included.

    Raises:
        UserError: it does not take the two sizes, takes an argument by position only, or a value is not plain.
    """
    signature = inspect.signature(cls.__init__)  # not of the class, for which some versions of Python look at `__new__`
    if tuple(signature.parameters)[1:3] != SIZES:
        raise UserError(f"{cls.__name__}.__init__ must take vocab_size and block_size as its first two arguments")
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise UserError(
                f"{cls.__name__}.__init__ must take its argument {name} by name: a checkpoint stores arguments by name"
            )
    bound = signature.bind(None, *args, **kwargs)  # raises TypeError as the call would
    bound.apply_defaults()
    config: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        config |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    for name, value in config.items():
        if not _is_plain(value):
            raise UserError(
                f"{cls.__name__} cannot be stored in a checkpoint: its argument {name} is a {type(value).__name__}, and "
                "only plain values can be stored (numbers, strings, booleans, None, and lists or dicts of them)"
            )
    return copy.deepcopy(config)  # the network may change a list that it was given


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return value is None or type(value) in (bool, int, float, str)
