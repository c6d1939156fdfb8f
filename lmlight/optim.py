"""What moves the weights: parameter groups and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lmlight.errors import UserError


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """The net's parameters in two groups: matrices, which decay, and vectors (norms, biases), which do not.

    Each group has a `name` for the logs. The groups go to any torch optimizer; those without weight decay ignore the
    second group's zero.
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"name": "matrices", "params": matrices}]
    if vectors:
        groups.append({"name": "vectors", "params": vectors, "weight_decay": 0.0})
    return groups


def label_in_order(state: dict[str, Any], optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Relabels an optimizer's state, in place, by each parameter's place among `parameters`.

    torch labels by the place among the groups' parameters, one group after the other, and reads any labels. Lightning's
    sharded strategies take a label for the place in the model: with this one, a checkpoint means the same to both.

    Args:
        state: what `optimizer.state_dict()` gave.
        optimizer: whose it is.
        parameters: the model's, in its order.
    """
    place = {id(parameter): index for index, parameter in enumerate(parameters)}
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    label = {old: place[id(parameter)] for old, parameter in enumerate(grouped)}
    state["state"] = {label[old]: value for old, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [label[old] for old in group["params"]]


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run, as a factor of the optimizer's `lr`.

    Args:
        shape: after the warm-up, `linear` and `cosine` fall until the last step; `decay` stays at 1 and falls linearly
            over the last `decay_fraction` of the run; `constant` stays at 1.
        warmup_steps: steps of linear rise from 0.
        decay_fraction: the share of the steps in which `decay` falls.
        final_factor: what it falls to.

    Raises:
        UserError: a negative `warmup_steps`, or a fraction or factor outside [0, 1].
    """

    shape: Literal["linear", "cosine", "decay", "constant"] = "linear"
    warmup_steps: int = 100
    decay_fraction: float = 0.4
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps must be 0 or more, got {self.warmup_steps}")
        for name, value in (("decay_fraction", self.decay_fraction), ("final_factor", self.final_factor)):
            if not 0 <= value <= 1:
                raise UserError(f"schedule.{name} must lie in [0, 1], got {value}")

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for optimizer step `step`, counted from 0, of `total_steps`.

        Raises:
            UserError: the shape falls towards an end that is not known (`total_steps` < 1).
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return 1.0
        if total_steps < 1:
            raise UserError(
                f"a {self.shape} schedule ends at the run's last step: set --trainer.max_steps, or "
                "--model.schedule.shape constant"
            )
        length = self.decay_fraction * total_steps if self.shape == "decay" else total_steps - self.warmup_steps
        left = min(1.0, max(0.0, (total_steps - step) / max(1.0, length)))  # 1 until the fall begins, 0 at the end
        if self.shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.final_factor + (1 - self.final_factor) * left
