"""A run as a curve, a table and a line in the table of all runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lmlight import curves
from lmlight.training.callbacks.base import run_folder, validates_fit
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel

FIGURES = ("val/nats_per_char", "train_sample/nats_per_char")


class LearningCurve(Callback):
    """`metrics.csv` and `curve.png` in the run's folder; and in TensorBoard, the losses of validations with other axes.

    `by_characters/…` and `by_seconds/…` count characters of training text seen and seconds where other figures count steps:
    so runs with different tokenizers and batches lie over each other. Seconds are those of the run, validations included,
    the time between an interruption and its resumption apart.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._seconds_before = 0.0
        self._began: float | None = None
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer) if trainer.logger is not None else None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows, self._seconds_before = list(state_dict["rows"]), state_dict["seconds"]

    def _seconds(self) -> float:
        return self._seconds_before + (0.0 if self._began is None else time.monotonic() - self._began)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        # a resumed run hides what comes after its step, and these axes run ahead of steps: say it all again
        for row in self._rows:
            self._show(trainer, row)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not validates_fit(trainer):
            return
        data = getattr(trainer, "datamodule", None)
        row = {"step": float(trainer.global_step), "seconds": self._seconds()}
        if isinstance(data, TextDataModule):
            row["characters"] = data.characters_seen(trainer.global_step)
        sections = ("train/", "val/", "train_sample/", "gap/")
        row |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(sections)}
        self._rows.append(row)
        self._show(trainer, row)
        if trainer.is_global_zero and self._folder:
            curves.write(self._rows, self._folder)

    def _show(self, trainer: Trainer, row: dict[str, float]) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger):
            return
        for axis in ("characters", "seconds"):
            for name in FIGURES:
                if axis in row and name in row:
                    tag = f"by_{axis}/{name.replace('/', '_')}"
                    trainer.logger.experiment.add_scalar(tag, row[name], round(row[axis]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if self._rows and trainer.is_global_zero and self._folder:
            from lmlight import pictures

            pictures.learning_curves({self._folder.name: self._rows}).savefig(self._folder / curves.PICTURE)


class HParamsLogger(Callback):
    """The settings that matter in TensorBoard's HParams, beside the run's last figures: a table of runs to sort.

    Args:
        figures: the columns to sort by.
    """

    # what says where and how text is written, and nothing about what is learned
    LEFT_OUT = ("model.sampling", "data.prompts", "data.prompt_batch_size", "data.num_workers", "data.cache")

    def __init__(self, figures: tuple[str, ...] = ("val/nats_per_char", "val/bpc", "gap/nats_per_char")) -> None:
        self.figures = figures

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None
        kept = pl_module.settings or {"model": {"net": pl_module.net.config}}
        settings: dict[str, Any] = {
            "weights": pl_module.net.num_parameters,
            "steps": pl_module.total_steps,
            "precision": str(trainer.precision),
            "seed": kept.get("seed_everything", pl_module.seed),
        }
        for section in ("data", "model"):
            for name, value in kept.get(section, {}).items():
                if f"{section}.{name}" not in self.LEFT_OUT:
                    settings |= _flat(value, name)
        # not `logger.log_hyperparams`, which also writes a first value of each figure, and there is none yet
        for summary in hparams(settings, dict.fromkeys(self.figures, 0.0)):  # type: ignore[no-untyped-call]  # torch's
            trainer.logger.experiment._get_file_writer().add_summary(summary)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of plain values: `init_args` is not a level, and a class goes by its last name."""
    if not isinstance(settings, dict):
        plain = settings if isinstance(settings, (bool, int, float, str)) else str(settings)
        return {prefix: plain.rpartition(".")[2] if prefix.endswith("class_path") and isinstance(plain, str) else plain}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = prefix if name == "init_args" else f"{prefix}.{name}" if prefix else name
        flat |= _flat(value, inner)
    return flat
