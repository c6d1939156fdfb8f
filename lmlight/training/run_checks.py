"""Checks before a run prepares data or writes anything."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.strategies import FSDPStrategy

from lmlight.errors import UserError
from lmlight.optim import Schedule
from lmlight.training.run_settings import RUNS

UNSUPPORTED: dict[type[Callback], str] = {
    callbacks.BaseFinetuning: "it freezes modules before the network is built; override LanguageModel.configure_model",
    callbacks.GradientAccumulationScheduler: "data.batch_size fixes a step's windows; use trainer.accumulate_grad_batches",
    callbacks.LearningRateFinder: "the learning rate is an argument of the optimizer: compare values of model.optimizer.lr",
    callbacks.ModelPruning: "it looks for parameters before the network is built",
    callbacks.StochasticWeightAveraging: "it replaces the schedule, so the run could not be resumed; use EMAWeightAveraging",
    callbacks.SpikeDetection: "its state cannot be loaded, so the run could not be resumed; a non-finite loss stops any run",
}


def check_strategy(trainer: Trainer) -> None:
    """Raise a `UserError` for a strategy that the network does not support."""
    if isinstance(trainer.strategy, FSDPStrategy):
        raise UserError(
            "the strategy fsdp (FSDP1) is not supported: use ModelParallelStrategy, as in configs/fsdp.yaml"
        )


def check_run(trainer: Trainer, schedule: Schedule | None) -> None:
    """Raise a `UserError` for an unsupported callback or strategy, an interval out of range or a schedule without an end."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set outside __init__
        for kind, reason in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__} cannot be used: {reason}")
    check_strategy(trainer)
    # missing if the interval is a duration
    if (interval := getattr(trainer, "val_check_interval", None)) is not None and interval <= 0:
        raise UserError(f"trainer.val_check_interval must be above 0, got {interval}")
    if (epochs := trainer.check_val_every_n_epoch) is not None and epochs < 1:
        raise UserError(f"trainer.check_val_every_n_epoch must be at least 1, got {epochs}")
    if (trainer.gradient_clip_val or 0) < 0:
        raise UserError(
            f"trainer.gradient_clip_val must be 0 or more, got {trainer.gradient_clip_val}; null turns it off"
        )
    if schedule and trainer.max_steps < 0 and (trainer.max_epochs is None or trainer.max_epochs < 0):
        schedule.check_end(0)


def check_loggers(loggers: Sequence[Any]) -> None:
    """Refuse arguments of `RunLogger`, given as settings, because the command line chooses them."""
    for settings in (one for one in loggers if isinstance(one, dict) and one["class_path"].startswith("lmlight.")):
        for name, value in settings.get("init_args", {}).items():
            if value not in (None, RUNS):
                raise UserError(
                    f"--trainer.logger.{name} cannot be set, because lmlight names the folders of runs: leave it out, or "
                    "pass --trainer.default_root_dir"
                )
