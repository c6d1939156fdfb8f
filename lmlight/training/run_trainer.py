"""The Trainer of the command line: a folder for each run, its `config.yaml`, its time limit, and the subcommands."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.data import streaming
from lmlight.errors import UserError
from lmlight.training.callbacks import RunLogger
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel
from lmlight.training.run_settings import CONFIG


class RunTrainer(Trainer):
    """Lightning's Trainer.

    Its methods are the subcommands of `lmlight`, and their arguments the subcommands' flags.
    """

    run_folder: str | None = None  # known once `log_dir` has been asked for, by all ranks together

    @property
    def log_dir(self) -> str:
        """The run's folder, whichever loggers there are; for its config, checkpoints and learning curve."""
        if self.run_folder is None:
            made: str | None = str(self.default_root_dir)
            if ours := next((logger for logger in self.loggers if isinstance(logger, RunLogger)), None):
                made = ours.log_dir
            elif self.state.fn == "fit" and not self.fast_dev_run and self.is_global_zero:  # type: ignore[attr-defined]
                made = str(checkpoints.make_run_dir(Path(self.default_root_dir)))
            self.run_folder = str(self.strategy.broadcast(made))
        return self.run_folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that a strategy has spawned."""
        self.__dict__.update(state)
        quiet()

    def fit(  # type: ignore[override]
        self,
        model: LanguageModel,
        datamodule: TextDataModule,
        ckpt_path: str | None = None,
        init_from: str | None = None,
    ) -> None:
        """Train a model, resume a run (--ckpt_path) or finetune (--init_from).

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Resume the run of this checkpoint, with the run's own settings. A checkpoint is a file, a run's
                folder, or `best` or `last` of the newest run that has one.
            init_from: Finetune: start from the network, weights and tokenizer of this checkpoint; everything else is new.
        """
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def prepare(
        self,
        model: LanguageModel,
        datamodule: TextDataModule,
        init_from: str | None = None,
        to: str | None = None,
        format: Literal["store", "litdata"] = "store",
    ) -> None:
        """Train the tokenizer and encode a text, so that fit starts at once.

        Args:
            model: Not used.
            datamodule: The data.
            init_from: Use the tokenizer of this checkpoint.
            to: Folder for a copy of the result, to pass as `--data.corpus`; null leaves it in the cache.
            format: Format of the copy: `store` to read from a disk, `litdata` to stream while training.
        """
        if format == "litdata" and to is None:
            raise UserError("--format litdata writes a folder of its own: pass --to FOLDER")
        store = datamodule.prepare()
        if to is not None:
            target = Path(to).expanduser()
            store = streaming.write(store, target) if format == "litdata" else store.copy(target)
        tokens = ", ".join(f"{name} {store.tokens[name]:,}" for name in store.tokens)
        print(f"Prepared: {os.path.relpath(store.folder)} (tokens: {tokens}; {store.tokenizer.vocab_size:,} pieces)")
        print(f"  {command()} fit --data.corpus {os.path.relpath(store.folder)}")

    def validate(  # type: ignore[override]
        self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None
    ) -> None:
        """Score a checkpoint on the validation text.

        Args:
            model: The model, with the checkpoint's weights.
            datamodule: The data.
            ckpt_path: A file, a run's folder, or `best` or `last` of the newest run that has one.
        """
        super().validate(model, datamodule=datamodule, verbose=False)
        self._print_metrics()

    def test(  # type: ignore[override]
        self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None
    ) -> None:
        """Score a checkpoint on the test text, also with a sliding window.

        Args:
            model: The model, with the checkpoint's weights.
            datamodule: The data.
            ckpt_path: A file, a run's folder, or `best` or `last` of the newest run that has one.
        """
        super().test(model, datamodule=datamodule, verbose=False)
        self._print_metrics()

    def predict(  # type: ignore[override]
        self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None, output: str | None = None
    ) -> None:
        """Generate text from a checkpoint.

        Args:
            model: The model, with the checkpoint's weights.
            datamodule: The prompts.
            ckpt_path: A file, a run's folder, or `best` or `last` of the newest run that has one.
            output: JSON Lines file for the texts, with tokens, log-probabilities and seeds; null prints them.
        """
        super().predict(model, datamodule=datamodule, return_predictions=False)

    def _print_metrics(self) -> None:
        if self.is_global_zero:
            for name, value in sorted(self.callback_metrics.items()):
                print(f"{name:<28}{value.item():>12.6g}")


class TimeLimit(Timer):
    """`trainer.max_time`, counted from the start of this process; Lightning's Timer would count previous processes too."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class SaveConfig(Callback):
    """Writes `config.yaml` into the run's folder when training starts: a refused resume leaves the old file unchanged.

    Args:
        settings: Plain values.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(str(trainer.log_dir))  # on every rank, because it is broadcast
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with files.whole(folder / CONFIG) as beside:
                beside.write_text(yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the folders of a run that failed before it began: `rmdir` removes empty ones only."""
        assert isinstance(trainer, RunTrainer)
        if trainer.run_folder and trainer.is_global_zero:
            with suppress(OSError):
                Path(trainer.run_folder).rmdir()
                Path(trainer.run_folder).parent.rmdir()


def quiet() -> None:
    """Reduce Lightning's tips and all warnings to what a user can act on, one line each."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what `--trainer.profiler simple` prints
    for tip in (
        "does not have many workers",
        "number of training batches",
        "callbacks used to create",
        "sync_dist=True",
        "LeafSpec",
    ):
        warnings.filterwarnings("ignore", message=f".*{tip}")
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"lmlight: warning: {' '.join(str(message).split())}\n"


def command() -> str:
    """What to type for `lmlight` where this process was started; its environment may not be activated."""
    typed = Path(sys.argv[0])
    if typed.stem != "lmlight":  # python -m lmlight, or a notebook
        return f"{sys.executable} -m lmlight"
    found = shutil.which("lmlight")
    return "lmlight" if found and Path(found).resolve() == typed.resolve() else os.path.relpath(typed)
