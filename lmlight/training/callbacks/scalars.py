"""Figures of a run beside its losses: how fast, how much the weights move, how far training and validation are apart.

All are logged every `trainer.log_every_n_steps` steps, but for those of validations.
"""

from __future__ import annotations

import time
from typing import Any, cast

import psutil
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lmlight.data.loader import Batch
from lmlight.errors import UserError
from lmlight.training.callbacks.base import validates_fit
from lmlight.training.datamodule import TextDataModule
from lmlight.training.metrics import TextLoss
from lmlight.training.module import LanguageModel


def logs_now(trainer: Trainer, model: LanguageModel) -> bool:
    """In `on_train_batch_end`: whether a step has just been made, and is one that reaches the logs."""
    return model.step_is_logged and not trainer.fit_loop.epoch_loop._should_accumulate()


class SmoothLoss(Callback):
    """`train/loss_smooth`: an exponential mean of the logged training losses, beside the raw `train/loss`.

    Args:
        over: about so many logged losses count.
    """

    def __init__(self, over: int = 10) -> None:
        if over < 1:
            raise UserError(f"SmoothLoss.over must be at least 1, got {over}")
        self.over = over
        self._mean = self._weight = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"mean": self._mean, "weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._mean, self._weight = state_dict["mean"], state_dict["weight"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        if not logs_now(trainer, pl_module):
            return
        loss = float(cast(Tensor, trainer.strategy.reduce(pl_module.step_loss.clone(), reduce_op="mean")))
        keep = 1 - 1 / self.over
        self._mean = keep * self._mean + (1 - keep) * loss
        self._weight = keep * self._weight + (1 - keep)
        pl_module.log("train/loss_smooth", self._mean / self._weight)


class Throughput(Callback):
    """Speed and memory, validations apart:

    - `throughput/tokens_per_second` and `characters_per_second`, over all devices;
    - `throughput/mfu`: the net's operations (`Net.flops_per_token`, three times for training) as a share of what the device
      can: by its data sheet if Lightning knows it, else the rate of a large matrix product, measured as training begins;
    - `throughput/waiting_for_data`: the share of the time in which the next batch was waited for;
    - `throughput/memory_gib`: the device's memory at its fullest; on a CPU, this process's now.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None
        self._flops_per_token = 3 * pl_module.net.flops_per_token()
        precision = str(trainer.precision)
        dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
        self._peak = trainer.world_size * _flops_per_second(trainer.strategy.root_device, dtype)
        self._paused_at: float | None = None
        self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._began, self._paused = time.perf_counter(), 0.0
        self._waited = getattr(trainer.train_dataloader, "waited", 0.0)
        self._tokens, self._characters = 0, cast(Any, 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._paused_at is not None:  # a validation, and all that was looked at and saved at its end
            self._paused += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += batch.targets.numel()
        self._characters += batch.target_chars.sum()
        assert isinstance(pl_module, LanguageModel)
        if not logs_now(trainer, pl_module):
            return
        float(pl_module.step_loss)  # a GPU may still be at it
        seconds = time.perf_counter() - self._began - self._paused
        tokens_per_second = trainer.world_size * self._tokens / seconds
        figures = {
            "tokens_per_second": tokens_per_second,
            "characters_per_second": trainer.world_size * float(self._characters) / seconds,
            "waiting_for_data": (getattr(trainer.train_dataloader, "waited", 0.0) - self._waited) / seconds,
            "memory_gib": _memory(trainer.strategy.root_device) / 2**30,
        }
        if self._flops_per_token:  # a table multiplies nothing
            figures["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        pl_module.log_dict({f"throughput/{name}": value for name, value in figures.items()})
        self._restart(trainer)


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of one device, in matrix products."""
    known = get_available_flops(device, dtype)
    if known:
        return float(known)
    size = 1024 if device.type == "cpu" else 4096  # a GPU is done with less before the next launch
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return float(psutil.Process().memory_info().rss)


class UpdateRatio(Callback):
    """`update_ratio/<part>`: how far a step has moved each part of the net, as a share of its weights' length.

    A part is a block, an embedding, the head. About 1e-3 is usual; much less learns slowly, much more is unsteady.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._before: dict[str, list[Tensor]] | None = None
        if pl_module.step_is_logged:
            self._before = {
                part: [weight.detach().clone() for weight in weights] for part, weights in _parts(pl_module).items()
            }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        if not logs_now(trainer, pl_module) or self._before is None:
            return
        ratios = {}
        for part, weights in _parts(pl_module).items():
            before = self._before[part]
            moved = _length([after.detach() - old for after, old in zip(weights, before)])
            ratios[f"update_ratio/{part}"] = moved / _length(before).clamp(min=1e-12)
        pl_module.log_dict(ratios)
        self._before = None


def _parts(model: LanguageModel) -> dict[str, list[Tensor]]:
    assert model.net is not None
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.net.named_parameters():
        words = name.split(".")
        part = f"block {int(words[1]) + 1}" if words[0] == "blocks" else words[0]
        parts.setdefault(part, []).append(parameter)
    return parts


def _length(tensors: list[Tensor]) -> Tensor:
    length = torch.nn.utils.get_total_norm(tensors)
    return length.full_tensor() if isinstance(length, DTensor) else length


class TrainSubsetEval(Callback):
    """`train_sample/nats_per_char`: the loss on some of the training text, measured exactly as on the validation text, and
    `gap/nats_per_char`, by how much the latter is larger: what the net knows of the text it has seen and of no other.

    Args:
        windows: of `block_size` tokens, spread evenly over the training text.
    """

    def __init__(self, windows: int = 32) -> None:
        if windows < 1:
            raise UserError(f"TrainSubsetEval.windows must be at least 1, got {windows}")
        self.windows = windows

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not validates_fit(trainer) or not isinstance(data, TextDataModule):
            return
        assert isinstance(pl_module, LanguageModel)
        metric = TextLoss().to(pl_module.device)
        with trainer.precision_plugin.val_step_context():  # autocast, as in validation
            for batch in data.train_sample_dataloader(self.windows):
                pl_module.score(trainer.strategy.batch_to_device(batch), metric)
        seen = metric.compute()["nats_per_char"]
        unseen = pl_module.val_loss.compute()["nats_per_char"]
        pl_module.log_dict({"train_sample/nats_per_char": seen.float(), "gap/nats_per_char": (unseen - seen).float()})
