"""Code shared by the callbacks: when they run, and where they write."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel


class FitCallback(Callback):
    """A callback that watches `fit`. Subclasses override `on_logged_step` and `on_fit_validation_end`."""

    def on_logged_step(self, trainer: Trainer, model: LanguageModel) -> None:
        """Called after each optimizer step that is logged: every `trainer.log_every_n_steps` steps."""

    def on_fit_validation_end(self, trainer: Trainer, model: LanguageModel) -> None:
        """Called on every rank after each validation of `fit` but not after the sanity check; `model.log` works here."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if stepped and pl_module.step_is_logged:
            self.on_logged_step(trainer, pl_module)

    # not on_validation_end: by then, WeightAveraging has put the current weights back
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if validates_fit(trainer):
            assert isinstance(pl_module, LanguageModel)
            self.on_fit_validation_end(trainer, pl_module)


def validates_fit(trainer: Trainer) -> bool:
    """In a validation hook: whether `fit` is validating, and not in Lightning's sanity check before the first step."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def text_data(trainer: Trainer) -> TextDataModule | None:
    """The run's data module if it is a `TextDataModule`, else None."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TextDataModule) else None


def summary_writer(trainer: Trainer) -> SummaryWriter | None:
    """TensorBoard's writer, which ignores all calls on ranks other than 0; None without a TensorBoard logger."""
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def run_folder(trainer: Trainer) -> Path | None:
    """The run's folder; None if it has none of its own, as with `fast_dev_run`. Call it on every rank."""
    folder = None if trainer.fast_dev_run else trainer.log_dir  # type: ignore[attr-defined]  # set outside __init__
    # without a logger, Lightning's Trainer has no folder for a run, but ours does
    is_own = trainer.logger is not None or Path(folder or ".") != Path(trainer.default_root_dir)
    return Path(folder) if folder and is_own else None
