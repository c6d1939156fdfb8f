"""The validations of a run as a table and a figure, and its settings in TensorBoard's table of runs."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.tensorboard.summary import hparams

from lmlight import files, pictures
from lmlight.training.callbacks.base import run_folder, summary_writer, text_data, validates_fit
from lmlight.training.module import LanguageModel


class LearningCurve(Callback):
    """Writes `metrics.csv` and `curve.png` to the run's folder: the metrics of each validation, and the losses as a figure.

    Besides optimizer steps, the table counts characters of training text seen, which compare across tokenizers and batch
    sizes, and seconds of training and validation. A resumed run continues both.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._began, self._seconds_before = time.monotonic(), 0.0
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer) if trainer.logger is not None else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic() - self._seconds_before

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "seconds": time.monotonic() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows, self._seconds_before = list(state_dict["rows"]), state_dict["seconds"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not validates_fit(trainer):
            return
        row = {"step": float(trainer.global_step), "seconds": time.monotonic() - self._began}
        if data := text_data(trainer):
            row["characters"] = data.characters_seen(trainer.global_step)
        sections = ("train/", "val/", "train_subset/", "gap/")
        row |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(sections)}
        self._rows.append(row)
        if trainer.is_global_zero and self._folder:
            names = dict.fromkeys(name for row in self._rows for name in row)
            with (
                files.whole(self._folder / "metrics.csv") as beside,
                beside.open("w", encoding="utf-8", newline="") as file,
            ):
                table = csv.DictWriter(file, list(names))
                table.writeheader()
                table.writerows(self._rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rows and trainer.is_global_zero and self._folder:
            pictures.learning_curves({self._folder.name: self._rows}).savefig(self._folder / "curve.png")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


class HParamsLogger(Callback):
    """Lists the run in TensorBoard's HParams: a table of runs to sort, their settings beside their last metrics."""

    METRICS = ("val/nats_per_char", "val/bpc", "gap/nats_per_char")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (writer := summary_writer(trainer)) is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None
        settings = pl_module.settings or {"model": {"net": pl_module.net.config}}
        params = {
            "weights": pl_module.net.num_parameters,
            "steps": pl_module.total_steps,
            "precision": str(trainer.precision),
            **_flatten({section: settings.get(section, {}) for section in ("data", "model")}),
        }
        # not logger.log_hyperparams, which also logs a first value of each metric, before there is one
        for summary in hparams(params, dict.fromkeys(self.METRICS, 0.0)):  # type: ignore[no-untyped-call]  # torch's
            writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]  # torch's


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings by the names of their flags; other values than these types as text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
