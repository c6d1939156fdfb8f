"""Parameter groups, the Muon optimizer and learning-rate schedules.

Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). Step size: Liu et al. 2025
(https://arxiv.org/abs/2502.16982). Coefficients of the iteration: You Jiacheng 2025, in `train_gpt_medium.py`
of https://github.com/KellerJordan/modded-nanogpt.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lmlight.errors import UserError, check_literals
from lmlight.models.base import Net
from lmlight.user_code import describe

HIDDEN = "hidden"
# Each iteration applies a polynomial of degree 5 that moves singular values towards 1. After these three of its five, those
# above 1/50 of the matrix's norm are between 0.55 and 1.2. Two more gain 0.006 nats/char in 110 steps, for 10% more time.
QUINTIC_COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (2.8769, -3.1427, 1.2046))


def parameter_groups(net: Net) -> list[dict[str, Any]]:
    """Group the trainable parameters of a net, for any torch optimizer.

    Returns:
        The non-empty groups among `hidden` (matrices between hidden layers), `embeddings` (matrices with one row per token
        or position, the output head included), `tensors` (of more dimensions, such as convolutions and stacked experts) and
        `vectors` (norms and biases, without weight decay).
    """
    tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    heads = [m.weight for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == net.vocab_size]
    tables |= {id(weight) for weight in heads[-1:]}  # a hidden layer may have as many outputs
    groups: dict[str, list[Tensor]] = {HIDDEN: [], "embeddings": [], "tensors": [], "vectors": []}
    for parameter in net.parameters():
        if parameter.requires_grad:
            matrix = "embeddings" if id(parameter) in tables else HIDDEN if parameter.dim() == 2 else "tensors"
            groups[matrix if parameter.dim() >= 2 else "vectors"].append(parameter)
    decay = {"vectors": {"weight_decay": 0.0}}
    return [
        {"name": name, "params": parameters, **decay.get(name, {})} for name, parameters in groups.items() if parameters
    ]


def make_optimizer(factory: Callable[[Any], Optimizer], net: Net | None = None, try_step: bool = False) -> Optimizer:
    """Make an optimizer for a net's parameter groups or, to check the factory, for a few dummy parameters.

    Args:
        factory: Takes parameter groups.
        net: The net; None takes dummy parameters.
        try_step: Take a step with gradients of one. Only after processes are launched, because torch's optimizers
            initialize the GPU.

    Raises:
        UserError: The optimizer takes no parameter groups, refuses an argument, cannot take a step with dense gradients, or
            does not call the closure that it is given.
    """
    shapes = {HIDDEN: (2, 2), "embeddings": (2, 2), "vectors": (2,)}
    dummies = [{"name": name, "params": [nn.Parameter(torch.ones(shape))]} for name, shape in shapes.items()]
    losses: list[Tensor] = []

    def closure() -> Tensor:
        losses.append(torch.zeros(()))
        return losses[-1]

    try:
        optimizer = factory(dummies if net is None else parameter_groups(net))
        if try_step:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step(closure)  # type: ignore[arg-type]  # typed as returning a float, documented to return a tensor
    except Exception as error:  # user-defined ones, too
        raise UserError(
            f"model.optimizer cannot train this model ({describe(error)}): choose another, such as torch.optim.AdamW"
        ) from error
    if try_step and not losses:
        raise UserError(
            f"{type(optimizer).__name__}.step must call its argument `closure`, which computes the loss and the gradients, "
            "inside torch.enable_grad()"
        )
    return optimizer


class Muon(Optimizer):
    """Muon for the hidden matrices, AdamW for all other parameters.

    Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix, so that weights move as far in rare
    directions of the gradient as in frequent ones. Its step is scaled to the size of AdamW's, so they share a learning rate.

    Args:
        params: Groups from `parameter_groups`. Muon updates the group named `hidden`; AdamW updates every other group.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of both. The default suits many epochs on a small text (Kim et al. 2025,
            https://arxiv.org/abs/2509.14786); for one or two epochs, use less than 1.
        momentum: Muon's Nesterov momentum, in [0, 1).
        betas: Coefficients of AdamW's running averages.
        eps: AdamW's epsilon.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        weight_decay: float = 1.7,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        # gets its groups and state from this optimizer at each step, because `load_state_dict` may replace them
        self._adamw = torch.optim.AdamW([torch.empty(0)], lr, betas, eps, weight_decay, fused=True)
        super().__init__(params, {**self._adamw.defaults, "momentum": momentum, "name": ""})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adamw = torch.optim.AdamW([torch.empty(0)], fused=True)  # copies and pickles leave it out

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's is overloaded
        """Update every group; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["name"] == HIDDEN:
                self._step_hidden(group)
        self._adamw.param_groups = [group for group in self.param_groups if group["name"] != HIDDEN]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _step_hidden(self, group: dict[str, Any]) -> None:
        same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # stacked for one batched iteration per shape
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(state["momentum"], group["momentum"])
            if isinstance(update, DTensor):  # the singular values are those of the whole matrix
                update = update.full_tensor()
            same_shape.setdefault(update.shape, []).append((parameter, update))
        for shape, members in same_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in members]))
            step = group["lr"] * 0.2 * math.sqrt(max(shape))  # matches the RMS of AdamW's updates (Liu et al. 2025)
            for (parameter, _), update in zip(members, updates.to(members[0][0].dtype)):
                if isinstance(parameter, DTensor):
                    update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-step)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U Vᵀ of the singular value decompositions U S Vᵀ, using matrix products only.

    Args:
        matrices: (N, rows, columns).

    Returns:
        (N, rows, columns); bfloat16 on GPUs that support it, where such products are fastest and precise enough.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonalize(matrices.mT).mT
    x = matrices
    if x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):  # Turing emulates it, slower than float32
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for a, b, c in QUINTIC_COEFFICIENTS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def label_in_order(state: dict[str, Any], optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Renumber an optimizer's state dict, in place, by each parameter's position in the model.

    torch numbers parameters group by group and accepts any numbers on loading; Lightning's sharded strategies number them by
    their position in the model. With the latter, single-process and sharded runs can resume each other's checkpoints.
    """
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    label = {old: position[id(parameter)] for old, parameter in enumerate(grouped)}
    state["state"] = {label[old]: value for old, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [label[old] for old in group["params"]]


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_changes(scheduler: LRScheduler, now: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Give a resumed run the optimizer arguments that have changed since its checkpoint was written.

    Loading the states of the optimizer and the scheduler has restored the old ones. `now` holds the `hyperparameters` of
    the new optimizer from before loading, `before` those that the checkpoint stores.
    """
    for number, (group, new, old) in enumerate(zip(scheduler.optimizer.param_groups, now, before)):
        changed = {name: value for name, value in new.items() if old.get(name) != value}
        if "lr" in changed:
            scheduler.base_lrs[number] = group["initial_lr"] = changed["lr"]
            changed["lr"] *= group["lr"] / old["lr"] if old["lr"] else 1.0  # the factor of the schedule
        group.update(changed)


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule, as a factor of the optimizer's `lr`.

    Args:
        shape: After the warmup, `linear` and `cosine` decay until the end; `decay` (warmup-stable-decay) stays
            at 1, then decays linearly over the last `decay_fraction` of the run; `constant` stays at 1.
        warmup_steps: Steps of linear warmup.
        decay_fraction: Fraction of the steps over which `decay` decays.
        final_factor: Factor at step `total_steps`, one past the last step.

    Raises:
        UserError: `shape` is not a valid choice, `warmup_steps` is negative, or a fraction or factor is outside [0, 1].
    """

    shape: Literal["linear", "cosine", "decay", "constant"] = "linear"
    warmup_steps: int = 20
    decay_fraction: float = 0.4
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        check_literals(Schedule, vars(self), "schedule.")
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps must be 0 or more, got {self.warmup_steps}")
        for name, value in (("decay_fraction", self.decay_fraction), ("final_factor", self.final_factor)):
            if not 0 <= value <= 1:
                raise UserError(f"schedule.{name} must lie in [0, 1], got {value}")

    def check_end(self, total_steps: int) -> None:
        """Raise a `UserError` if the shape decays and the run has no end, i.e. `total_steps` is less than 1."""
        if self.shape != "constant" and total_steps < 1:
            raise UserError(
                f"a {self.shape} schedule ends at the run's last step, which is not known: set --trainer.max_steps, "
                "or --trainer.max_epochs if the data has a length, or --model.schedule.shape constant"
            )

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for optimizer step `step` (from 0) of `total_steps`; raises like `check_end`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return 1.0
        self.check_end(total_steps)
        length = self.decay_fraction * total_steps if self.shape == "decay" else total_steps - self.warmup_steps
        left = min(1.0, max(0.0, (total_steps - step) / max(1.0, length)))  # from 1 to 0 over the decay
        if self.shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.final_factor + (1 - self.final_factor) * left
