"""A run's folder, its progress on the terminal, and its validations as a table and a figure."""

import csv
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.tensorboard import TensorBoardLogger as FabricTensorBoardLogger
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from lmlight import files, pictures
from lmlight.errors import reason
from lmlight.training.callbacks.base import run_folder, text_data, validates_fit
from lmlight.training.module import LanguageModel
from lmlight.training.run_settings import make_run_dir


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard files to the run's own folder: `runs/2025-01-31_12-00-00`, with `-2` and so on if taken.

    Args:
        save_dir: parent folder of all runs; the command line passes `trainer.default_root_dir`.
        version: name of this run's folder; null makes one from the time.
        purge_step: hide this and later steps in existing files, because a resumed run logs them again.
    """

    def __init__(self, save_dir: str = "runs", version: str | None = None, purge_step: int | None = None) -> None:
        super().__init__(
            str(Path(save_dir).expanduser()), name="", version=version, default_hp_metric=False, purge_step=purge_step
        )

    def _get_next_version(self) -> str:  # type: ignore[override]
        if getattr(rank_zero_only, "rank", 0) != 0:
            return ""  # not used: rank 0 broadcasts its folder
        return make_run_dir(Path(self.root_dir)).name

    def save(self) -> None:
        """Without Lightning's `hparams.yaml`: the settings are in `config.yaml`."""
        FabricTensorBoardLogger.save(self)


class RunProgress(Callback):
    """Shows one bar for the whole run, and one line per validation; if stderr is not a terminal, only the lines."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        weights = sum(p.numel() for p in pl_module.parameters())
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        count = f"{trained:,} of {weights:,}" if trained < weights else f"{weights:,}"
        folder = run_folder(trainer)
        where = f" in {files.shown(folder)}" if folder else ""
        self._print(trainer, f"Training {count} parameters on {trainer.strategy.root_device}{where}")
        steps = pl_module.total_steps if isinstance(pl_module, LanguageModel) else max(0, trainer.max_steps)
        hidden = None if trainer.is_global_zero else True  # None: unless stderr is a terminal
        options: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "leave": False, "disable": hidden}
        self._bar = tqdm(total=steps or None, initial=trainer.global_step, **options)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        every: int = trainer.log_every_n_steps or 10  # type: ignore[attr-defined]  # set outside __init__
        # only after logged steps: reading a metric waits for the device
        if not self._bar.disable and trainer.global_step % every == 0 and trainer.global_step > self._bar.n:
            metrics = _metrics(trainer)
            if (speed := trainer.callback_metrics.get("throughput/tokens_per_second")) is not None:
                metrics["tokens/s"] = f"{speed:,.0f}"
            self._bar.set_postfix(metrics, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if validates_fit(trainer):
            metrics = "  ".join(f"{name} {value}" for name, value in _metrics(trainer).items())
            of = f"/{self._bar.total}" if self._bar.total else ""
            seconds = time.monotonic() - self._began
            self._print(trainer, f"step {trainer.global_step:>5}{of}  {metrics}  {seconds:.0f} s")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()

    def _print(self, trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            with tqdm.external_write_mode(file=sys.stdout):  # above the bar
                print(line, flush=True)


def _metrics(trainer: Trainer) -> dict[str, str]:
    names, found = ("train/loss", "val/loss", "val/nats_per_char"), trainer.callback_metrics
    return {name: f"{found[name]:.4f}" for name in names if name in found}


class LearningCurve(Callback):
    """Writes `metrics.csv` and `curve.png` to the run's folder: the metrics of each validation, and the losses as a figure.

    Besides optimizer steps, the table counts characters of training text seen, which are comparable across tokenizers and
    batch sizes, and seconds of training without validation. A resumed run continues both.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._seconds = 0.0
        self._since: float | None = None  # when training began or continued; None after a validation
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = run_folder(trainer)  # on every rank
        self._folder = folder if trainer.logger is not None and trainer.is_global_zero else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._since is not None:
            self._seconds, self._since = self._seconds + time.monotonic() - self._since, None

    def state_dict(self) -> dict[str, Any]:
        self._stop_clock()
        return {"rows": self._rows, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows, self._seconds = list(state_dict["rows"]), state_dict["seconds"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not validates_fit(trainer):
            return
        row = {"step": float(trainer.global_step), "seconds": self._seconds}
        if data := text_data(trainer):
            row["characters"] = data.characters_seen(trainer.global_step)
        sections = ("train/", "val/", "train_subset/", "gap/")
        row |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(sections)}
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside __init__
        previous = self._rows[-1]["step"] if self._rows else 0.0
        if every and row["step"] // every == previous // every:
            row.pop("train/loss", None)  # last logged before the previous row; a run resumed since then lacks it
        self._rows.append(row)
        if self._folder is None:
            return
        with _writing(self._folder / "metrics.csv") as beside, beside.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in self._rows for name in row)))
            table.writeheader()
            table.writerows(self._rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rows and self._folder:
            with _writing(self._folder / "curve.png") as beside:
                pictures.learning_curves({self._folder.name: self._rows}).savefig(beside, format="png")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """`files.whole`, but an error is a warning: on Windows, a program such as Excel may have the old file open."""
    try:
        with files.whole(path) as beside:
            yield beside
    except OSError as error:
        warnings.warn(f"'{path}' cannot be written ({reason(error)}): training continues", stacklevel=2)
