"""Checkpointing, graceful shutdown and exact resume.

Lightning collects the state; this module decides when to write it, so that a resumed run equals an uninterrupted one:

- Never between the micro-batches of a step or, except at a validation, between two epochs; never just before a validation,
  which the resumed run would skip. Such a checkpoint is written at the end of that validation.
- SIGTERM and Ctrl-C only set a flag; the training loop writes the checkpoint as soon as these rules allow, and exits.
- Never with non-finite weights.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lmlight import checkpoint as checkpoints
from lmlight.errors import UserError
from lmlight.training.run_settings import resume_command

EXTRA_STATE = "_extra_state"  # torch's key for `LanguageModel.get_extra_state` in a state dict


class AtomicCheckpointIO(CheckpointIO):
    """Reads and writes checkpoints with `lmlight.checkpoint`: atomic, verified, and never running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        checkpoints.write(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = checkpoints.load(path)  # weights only, whatever the caller asked for
        # with EXTRA_STATE, this is not a checkpoint but the state dict that a spawned or forked process returns
        return content if EXTRA_STATE in content else checkpoints.check(content, path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class BestLastCheckpoint(Checkpoint):
    """Keeps `checkpoints/best.ckpt` and `checkpoints/last.ckpt` in the run's folder.

    `best` has the lowest `val/nats_per_char`, or `val/loss` if characters are not counted. `last` is written at each
    validation and at the end of the run, including after SIGTERM or Ctrl-C. The process then exits with 128 + the signal's
    number; a second signal exits immediately. With several processes, signals are checked only at validations and every
    `trainer.log_every_n_steps` steps.

    Args:
        every_n_steps: Also write `last` every this many steps; 0 disables this.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        self.every_n_steps = every_n_steps
        self.best_score: float | None = None
        self.validated_step: int | None = None  # of the last validation
        # characters scored by the last validation, in this run and in the run that it resumes
        self._characters = 0.0
        self._resumed_characters: float | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self._signal = self._agreed = 0  # received by this process; by any
        self._step = self._saved = 0  # before the batch; of the newest checkpoint
        self._within_step = self._stop_asked = False  # between the micro-batches of a step
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "characters": self._characters, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated_step = state_dict["validated_step"]
        # not if the run continues in another folder: its best.ckpt stays in the old one
        if (best := self._folder / "best.ckpt").is_file():
            self.best_score, self.best_model_path = state_dict["best_score"], str(best)
            self._resumed_characters = state_dict.get("characters")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / checkpoints.FOLDER
        interval = getattr(trainer, "val_check_interval", None)  # missing if it is a duration
        if stage == TrainerFn.FITTING and not isinstance(interval, float):
            self._check_interval(trainer, interval)

    def _check_interval(self, trainer: Trainer, batches: int | None) -> None:
        """Validations must fall between two steps; `batches` is None if the interval is a duration."""
        accumulate = trainer.accumulate_grad_batches
        if trainer.limit_val_batches and (batches or 1) % accumulate:
            found = "a duration" if batches is None else f"{batches} batches"
            raise UserError(
                f"trainer.val_check_interval must be a multiple of trainer.accumulate_grad_batches {accumulate}, got {found}"
            )

    def _check_epoch(self, trainer: Trainer, total_steps: int) -> None:
        """Validations must fall between two steps in later epochs, too, if batches are counted across epochs."""
        accumulate, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        counts = trainer.check_val_every_n_epoch is None and trainer.enable_validation and math.isfinite(batches)
        if counts and batches % accumulate and not 0 < total_steps <= math.ceil(batches / accumulate):
            raise UserError(
                f"an epoch has {batches} batches, which is not a multiple of trainer.accumulate_grad_batches {accumulate}: "
                "change the batch size or trainer.limit_train_batches, or set --trainer.check_val_every_n_epoch 1, because "
                "validations may not interrupt a step"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_epoch(trainer, getattr(pl_module, "total_steps", 0))
        batches = trainer.val_check_batch  # None if the interval is a duration
        if batches is not None and batches < trainer.num_training_batches:  # a fraction of the epoch
            self._check_interval(trainer, int(batches))
        loop = trainer.fit_loop.epoch_loop
        # Resumed from a checkpoint at a validation that this run lacks, because its interval differs. As below, the
        # argument does not matter, because no training step takes an iterator.
        if loop.restarted_on_last and not loop._should_check_val_fx(None):  # type: ignore[arg-type]
            # the loggers' step, which Lightning would increment only after that validation
            loop.on_load_checkpoint({"_batches_that_stepped": trainer.global_step})
            if loop.batch_progress.is_last_batch:  # Lightning would end the next epoch at once
                loop.batch_progress.reset_on_run()
        self._within_step, self._stop_asked, self._saved = False, False, trainer.global_step
        self._signal = self._agreed = 0  # signals received in an earlier `fit` are forgotten
        if threading.current_thread() is threading.main_thread():  # signal.signal works only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal:
            os._exit(128 + number)
        self._signal = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._leave_if_agreed(trainer)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        self._within_step = step == self._step
        if self._within_step:  # a request to stop waits for the remaining micro-batches
            self._stop_asked, trainer.should_stop = self._stop_asked or trainer.should_stop, False
            return
        self._stop_asked, trainer.should_stop = False, trainer.should_stop or self._stop_asked
        over = trainer.should_stop or 0 < getattr(pl_module, "total_steps", 0) <= step
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch and not over:
            return  # Lightning cannot resume exactly between two epochs, so leave after the next step
        if over or step % (trainer.log_every_n_steps or 50) == 0 or trainer.world_size == 1:  # type: ignore[attr-defined]
            self._agree_to_leave(trainer)
        # the argument only matters for training steps that take an iterator of batches
        if trainer.enable_validation and loop._should_check_val_fx(None):  # type: ignore[arg-type]
            return  # saved at the end of this validation
        # not `step % every_n_steps == 0`, which may only hold at the ends of epochs
        is_due = self.every_n_steps and step // self.every_n_steps > self._saved // self.every_n_steps
        if self._agreed or over or is_due:
            self._save(trainer, "last")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._within_step:  # an epoch of unknown length has ended in the middle of a step
            return
        self.validated_step, metrics = trainer.global_step, trainer.callback_metrics
        score = metrics.get("val/nats_per_char", metrics.get("val/loss"))
        self._characters, before = float(metrics.get("val/characters", 0)), self._resumed_characters
        if before is not None and not math.isclose(self._characters, before, rel_tol=1e-4):  # devices round differently
            rank_zero_warn("the validation text has changed: best.ckpt is selected from scratch")
            self.best_score = None
        self._resumed_characters = None
        if score is not None and score.isfinite() and (self.best_score is None or score.item() < self.best_score):
            self.best_score = score.item()
            self.best_model_path = self._save(trainer, "best")
        self._agree_to_leave(trainer)
        self._save(trainer, "last")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_agreed(trainer)
        # the run's last step is not known in advance if it is the end of a loader without a length
        is_last_epoch = 0 < (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        if is_last_epoch and trainer.global_step > self._saved and not self._within_step:
            self._save(trainer, "last")

    def _agree_to_leave(self, trainer: Trainer) -> None:
        """Agree to end all processes after this step if any got a signal. With several GPUs, waits for work in progress."""
        self._agreed = self._signal
        if trainer.world_size > 1:
            number = torch.tensor(self._signal, device=trainer.strategy.root_device)
            self._agreed = int(trainer.strategy.reduce(number, reduce_op="max"))

    def _leave_if_agreed(self, trainer: Trainer) -> None:
        """Called once Lightning has logged the step."""
        if not self._agreed:
            return
        if trainer.is_global_zero:
            resume = f"; to resume: {resume_command(self.last_model_path)}" if self.last_model_path else ""
            name = signal.Signals(self._agreed).name
            print(f"lmlight: {name} at step {trainer.global_step}{resume}", file=sys.stderr)
        raise SystemExit(128 + self._agreed)

    def _save(self, trainer: Trainer, name: str) -> str:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside __init__
            return ""
        # the largest absolute weight: waits for the device once, not once per parameter
        if not total_norm(trainer.lightning_module.parameters(), math.inf).isfinite():
            raise non_finite_error("a weight", trainer)
        path = self._folder / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        self.last_model_path, self._saved = str(path), trainer.global_step
        return self.last_model_path


def reseed(device: torch.device, *position: int) -> None:
    """Seed torch with a position in the run, so that a resumed run draws the same numbers without saved generator states."""
    seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))
    # not torch.manual_seed, which formats a traceback for each kind of device that is not in use: 1 ms a step
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def total_norm(tensors: Iterable[Tensor], order: float = 2.0) -> Tensor:
    """The norm of all tensors together, which may be sharded over the processes."""
    norm = torch.nn.utils.get_total_norm(tensors, order)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def non_finite_error(what: str, trainer: Trainer) -> UserError:
    """The error that ends a run with a non-finite loss, gradient or weight; it names the checkpoint to resume from."""
    rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
    keepers = (one for one in trainer.checkpoint_callbacks if isinstance(one, BestLastCheckpoint))
    good = next((keeper.last_model_path for keeper in keepers), "") or trainer.ckpt_path or "none yet"
    return UserError(
        f"{what} is not a finite number at step {trainer.global_step} (learning rate {rate:.3g}): lower the learning rate; "
        f"the last good checkpoint: {good}"
    )
