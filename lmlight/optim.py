"""What moves the weights: parameter groups, the Muon optimizer, and the learning rate over time.

Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the size of its step: Liu et al. 2025
(https://arxiv.org/abs/2502.16982); the coefficients of its iteration: Amsel et al. 2025 (https://arxiv.org/abs/2505.16932).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lmlight.errors import UserError
from lmlight.models.base import Net

HIDDEN = "hidden"
# Each iteration takes singular values nearer to 1 as fast as a polynomial of degree 5 can; after these three, those above
# 1/50 of the matrix's norm lie between 0.55 and 1.2. Two more gained 0.006 nats/char in 110 steps, for a tenth of the time.
POLAR_EXPRESS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (2.8769, -3.1427, 1.2046))


def parameter_groups(net: Net) -> list[dict[str, Any]]:
    """The net's parameters in named groups, for any torch optimizer.

    Returns:
        those of `hidden`, the matrices between one hidden layer and the next; `embeddings`, the matrices with a row for
        each token or position; and `vectors` (norms, biases), which do not decay. Groups without parameters are left out.
    """
    tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(m.weight) for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == net.vocab_size}
    groups: dict[str, list[Tensor]] = {HIDDEN: [], "embeddings": [], "vectors": []}
    for parameter in net.parameters():
        if parameter.requires_grad:
            matrix = "embeddings" if id(parameter) in tables else HIDDEN
            groups[matrix if parameter.dim() >= 2 else "vectors"].append(parameter)
    decay = {"vectors": {"weight_decay": 0.0}}
    return [
        {"name": name, "params": parameters, **decay.get(name, {})} for name, parameters in groups.items() if parameters
    ]


class Muon(Optimizer):
    """Muon for the matrices of hidden layers, AdamW for everything else.

    Muon's step is the momentum with all its singular values made equal: directions that are rare in the gradients move
    as far as the frequent ones. It is scaled to the size of AdamW's, so that both take the same learning rate.

    Args:
        params: the groups of `parameter_groups`: Muon takes the one named `hidden`, AdamW all others and groups without a
            name.
        lr: of both.
        weight_decay: of both.
        momentum: Muon's, in Nesterov's form.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 6e-3,
        weight_decay: float = 0.2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps, "name": ""},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's is overloaded
        """One step of every group; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._muon if group["name"] == HIDDEN else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # matrices of one shape are worked on together
        for parameter in parameters:
            gradient = cast(Tensor, parameter.grad)
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"])
            if isinstance(update, DTensor):  # sharded: singular values are the whole matrix's
                update = update.full_tensor()
            alike.setdefault(update.shape, []).append((parameter, update))
        for shape, members in alike.items():
            updates = orthogonalise(torch.stack([update for _, update in members]))
            step = group["lr"] * 0.2 * math.sqrt(max(shape))  # entries as large as AdamW's are, by Liu et al.
            for (parameter, _), update in zip(members, updates.to(parameters[0].dtype)):
                if isinstance(parameter, DTensor):
                    update = distribute_tensor(update, parameter.device_mesh, parameter.placements)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-step)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter)
                step = torch.zeros((), device=parameter.device)
                self.state[parameter].update(step=step, exp_avg=zeros, exp_avg_sq=zeros.clone())
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states):
            # neither torch nor Lightning moves the counts of a resumed run from the CPU, where checkpoints are read
            state["step"] = state["step"].to(parameter.device)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [cast(Tensor, parameter.grad) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all 1, roughly: U Vᵀ of their U S Vᵀ, by matrix products alone.

    Args:
        matrices: (N, rows, columns).

    Returns:
        (N, rows, columns), in bfloat16 on CUDA, where such products are fastest and precise enough.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonalise(matrices.mT).mT
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


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
    warmup_steps: int = 20
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
