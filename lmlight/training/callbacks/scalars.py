"""Scalars besides the losses: speed and memory, relative size of the updates, gap between training and validation."""

import re
import time
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lmlight.data.loader import Batch, as_batch
from lmlight.errors import UserError
from lmlight.training.callbacks.base import FitCallback, text_data
from lmlight.training.checkpointing import total_norm
from lmlight.training.metrics import TextLoss
from lmlight.training.module import LanguageModel


class Throughput(FitCallback):
    """Logs speed and memory. The time spent in validation is excluded.

    - `throughput/tokens_per_second` and `characters_per_second`, over all devices;
    - `throughput/mfu`: model FLOP/s (`Net.flops_per_token`, times three for training) as a share of the devices' peak, for
      GPUs whose peak Lightning knows;
    - `throughput/waiting_for_data`: with `TextDataModule`, share of the time spent waiting for the next batch;
    - `throughput/memory_gib`: the device's peak since training began on CUDA, the memory allocated by the driver on MPS.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None
        device = trainer.strategy.root_device
        self._flops_per_token = 3 * pl_module.net.flops_per_token()
        self._peak = trainer.world_size * _peak_flops_per_second(device, str(trainer.precision))  # 0: unknown
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._paused_at: float | None = None
        self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._began = time.perf_counter()
        self._waited = getattr(trainer.train_dataloader, "data_wait_seconds", 0.0)
        self._tokens = 0
        self._characters: Tensor | int = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._paused_at is not None:  # excluded: a validation, with its callbacks and checkpoints
            self._began += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        batch = as_batch(batch)
        self._tokens += batch.targets.numel()
        self._characters += batch.target_chars.sum()  # on the device, so nothing waits
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_logged_step(self, trainer: Trainer, model: LanguageModel) -> None:
        characters = float(self._characters)  # waits for the device, so before the clock is read
        seconds = time.perf_counter() - self._began
        tokens_per_second = trainer.world_size * self._tokens / seconds
        device = trainer.strategy.root_device
        metrics = {"tokens_per_second": tokens_per_second}
        if characters:  # not counted by every data module
            metrics["characters_per_second"] = trainer.world_size * characters / seconds
        if (waited := getattr(trainer.train_dataloader, "data_wait_seconds", None)) is not None:
            metrics["waiting_for_data"] = (waited - self._waited) / seconds
        if device.type == "cuda":
            metrics["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        elif device.type == "mps":
            metrics["memory_gib"] = torch.mps.driver_allocated_memory() / 2**30
        if self._flops_per_token and self._peak:  # a bigram table has none
            metrics["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        # numbers would become tensors on the device
        model.log_dict({f"throughput/{name}": torch.tensor(value) for name, value in metrics.items()})
        self._restart(trainer)


def _peak_flops_per_second(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of one device, from its data sheet for the precision's data type; 0 if Lightning does not know it."""
    dtypes = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = next((dtype for name, dtype in dtypes.items() if name in precision), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about devices that Lightning does not know
        return float(get_available_flops(device, dtype) or 0)


class UpdateRatio(FitCallback):
    """Logs `update_ratio/<part>`: the norm of an optimizer step over the norm of the weights, for each part of the net.

    A part is a block or another child module, such as the embedding, the final norm or the head. About 1e-3 is usual. Far
    below it, learning is slow; far above, training is unstable.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, LanguageModel)
        if pl_module.step_is_logged:
            self._before = {part: [w.detach().clone() for w in weights] for part, weights in _parts(pl_module).items()}

    def on_logged_step(self, trainer: Trainer, model: LanguageModel) -> None:
        ratios = {}
        for part, weights in _parts(model).items():
            before = self._before.pop(part)
            step = [new.detach() - old for new, old in zip(weights, before)]
            ratios[f"update_ratio/{part}"] = total_norm(step) / total_norm(before).clamp(min=1e-12)
        # for each value on a GPU, Lightning launches about ten kernels, while the GPU is otherwise idle
        model.log_dict({name: ratio.cpu() for name, ratio in ratios.items()})


def _parts(model: LanguageModel) -> dict[str, list[Tensor]]:
    """The weights of each block (`block 1`, ...) and of each other child module of the net."""
    assert model.net is not None
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.net.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        part = f"block {int(block[1]) + 1}" if block else name.partition(".")[0]
        parts.setdefault(part, []).append(parameter)
    return parts


class TrainSubsetEval(FitCallback):
    """Logs `train_subset/nats_per_char`, the loss on a subset of the training text, measured like the validation loss, and
    `gap/nats_per_char`, the validation loss minus that loss.

    Args:
        windows: windows of `block_size` tokens to score, spread evenly over the training text.
    """

    def __init__(self, windows: int = 32) -> None:
        if windows < 1:
            raise UserError(f"TrainSubsetEval.windows must be at least 1, got {windows}")
        self.windows = windows

    def on_fit_validation_end(self, trainer: Trainer, model: LanguageModel) -> None:
        if (data := text_data(trainer)) is None:
            return
        if not model.val_loss.update_called:
            raise UserError(
                "the callback TrainSubsetEval needs model.val_loss, which LanguageModel.validation_step updates: update it, "
                "or leave out the callback"
            )
        metric = TextLoss().to(model.device)
        with trainer.precision_plugin.val_step_context():
            for batch in data.train_subset_dataloader(self.windows):
                model.score(trainer.strategy.batch_to_device(batch), metric)
        train = metric.compute()["nats_per_char"]
        val = model.val_loss.compute()["nats_per_char"]
        model.log_dict({"train_subset/nats_per_char": train.float(), "gap/nats_per_char": (val - train).float()})
