"""What makes a run one that cannot be broken: when it saves, how it leaves, and that it goes on exactly.

Lightning decides how to save; here is when, so that a resumed run is the run it would have been:

- Never between the micro-batches of a step, and never just before a validation is due, which a resumed run would skip:
  then it is saved at that validation's end.
- SIGTERM and Ctrl-C set a flag and no more: the checkpoint is written by the training loop, at the next such moment.
- No checkpoint is written from weights that are not finite.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lmlight import checkpoint as checkpoints
from lmlight.errors import UserError

EXTRA_STATE = "_extra_state"  # torch's name for `LanguageModel.get_extra_state` in a state dict


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through `checkpoint.write` and `checkpoint.read`: atomic, sealed, and never running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        checkpoints.write(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = checkpoints.load(path)  # weights only, whatever was asked for
        # from processes that it has spawned or forked, Lightning hands the model's state dict back through a file
        return content if EXTRA_STATE in content else checkpoints.check(content, path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class BestLastCheckpoint(Checkpoint):
    """Keeps `checkpoints/best.ckpt` and `checkpoints/last.ckpt` in the run's folder.

    The best is where `val/nats_per_char` was smallest. The last is written at each validation, at the end of the run,
    however it ends, and on request every so many steps. After a signal the process ends with 128 + its number; a second
    one ends it at once.

    Args:
        every_n_steps: also save the last every so many steps; 0 does not.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise UserError(f"BestLastCheckpoint.every_n_steps must be 0 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.best_score: float | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self._signal = self._agreed = 0
        self._stop_asked = False  # between the micro-batches of a step
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        # a moved run, or another one than it was saved in: its best is not ours to report
        if self._path("best").is_file():
            self.best_model_path = str(self._path("best"))
        else:
            self.best_score = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(trainer.strategy.broadcast(log_dir)) / checkpoints.FOLDER
        interval = getattr(trainer, "val_check_interval", None)  # there is none where validations go by the clock
        accumulate = trainer.accumulate_grad_batches
        if stage == TrainerFn.FITTING and isinstance(interval, int) and interval % accumulate:
            raise UserError(
                f"trainer.val_check_interval {interval} counts batches: it must be a multiple of "
                f"trainer.accumulate_grad_batches {accumulate}, so that a validation falls between two steps"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_asked = False
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets the main thread alone handle signals
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            # whoever asks to stop waits for the step's other micro-batches
            self._stop_asked, trainer.should_stop = self._stop_asked or trainer.should_stop, False
            return
        self._stop_asked, trainer.should_stop = False, trainer.should_stop or self._stop_asked
        step = trainer.global_step
        over = trainer.should_stop or 0 < getattr(pl_module, "total_steps", 0) <= step
        if loop.batch_progress.is_last_batch and not over:
            return  # Lightning does not go on exactly from between two epochs; the next step will do
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        # asking the other processes makes a GPU wait, so they ask only where it waits anyway
        asks = trainer.world_size == 1 or over or due or getattr(pl_module, "step_is_logged", True)
        leaving = asks and self._agree_to_leave(trainer)
        assert trainer.fit_loop._data_fetcher is not None
        if trainer.enable_validation and loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            return  # saved at that validation's end
        if leaving or over or due:
            self._save(trainer, "last")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get("val/nats_per_char")
        if score is not None and (self.best_score is None or score.item() < self.best_score):
            self.best_score, self.best_model_path = score.item(), str(self._path("best"))
            self._save(trainer, "best")
        self._agree_to_leave(trainer)
        self._save(trainer, "last")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave_if_agreed(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_agreed(trainer)

    def _agree_to_leave(self, trainer: Trainer) -> bool:
        """Whether a signal has come to any rank, which ends all of them at this step."""
        if trainer.world_size == 1:
            self._agreed = self._signal
        else:
            number = torch.tensor(self._signal, device=trainer.strategy.root_device)
            self._agreed = int(trainer.strategy.reduce(number, reduce_op="max"))
        return self._agreed > 0

    def _leave_if_agreed(self, trainer: Trainer) -> None:
        """Ends the process; not where it is agreed, but once Lightning has logged that step."""
        if not self._agreed:
            return
        if trainer.is_global_zero:
            name = signal.Signals(self._agreed).name
            resume = f"lmlight fit --ckpt_path {self.last_model_path}"
            print(f"lmlight: {name} at step {trainer.global_step}; to resume: {resume}", file=sys.stderr)
        raise SystemExit(128 + self._agreed)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.ckpt"

    def _save(self, trainer: Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set late
            return
        if not all(bool(parameter.isfinite().all()) for parameter in trainer.lightning_module.parameters()):
            raise non_finite_error("a weight", trainer)
        trainer.save_checkpoint(self._path(name))
        self.last_model_path = str(self._path(name))


def non_finite_error(what: str, trainer: Trainer) -> UserError:
    """The end of a run whose numbers have left the finite ones: when, at which learning rate, and where to go on from."""
    rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
    keepers = (one for one in trainer.checkpoint_callbacks if isinstance(one, BestLastCheckpoint))
    good = next((keeper.last_model_path for keeper in keepers), "") or "none yet"
    return UserError(
        f"{what} is not a finite number at step {trainer.global_step} (learning rate {rate:.3g}): lower the learning rate; "
        f"the last good checkpoint: {good}"
    )
