"""The Trainer of the command line: a folder for each run, its `config.yaml`, the subcommands, and their output."""

import json
import logging
import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.command_line import counted, join, program
from lmlight.data import streaming
from lmlight.errors import UserError
from lmlight.generation import escape_control_characters
from lmlight.training.callbacks import RunLogger
from lmlight.training.checkpointing import BestLastCheckpoint
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel
from lmlight.training.run_settings import CONFIG, make_run_dir, resume_command
from lmlight.user_code import full_name


class RunTrainer(Trainer):
    """Lightning's Trainer.

    Its methods are the subcommands of `lmlight`, and their arguments are the flags. The first line of this docstring is a
    heading in the help.
    """

    run_folder: str | None = None  # set when all ranks first read `log_dir`

    @property
    def log_dir(self) -> str:
        """The run's folder, whichever logger is used. Holds its config, checkpoints and learning curve."""
        if self.run_folder is None:
            folder = str(self.default_root_dir)
            writes = not (self.fast_dev_run or self.barebones)  # type: ignore[attr-defined]  # Lightning sets them late
            if ours := next((logger for logger in self.loggers if isinstance(logger, RunLogger)), None):
                folder = ours.log_dir
            elif self.state.fn == "fit" and writes and self.is_global_zero:
                folder = str(make_run_dir(Path(folder)))
            self.run_folder = str(self.strategy.broadcast(folder))
        return self.run_folder

    def fit(  # type: ignore[override]
        self,
        model: LanguageModel,
        datamodule: TextDataModule,
        ckpt_path: str | None = None,
        init_from: str | None = None,
    ) -> None:
        """Train a model, resume a run (--ckpt_path) or finetune (--init_from).

        Args:
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
            init_from: Use the tokenizer of this checkpoint.
            to: Folder for a copy of the result, to pass as `--data.corpus`; null leaves it in the cache.
            format: Format of the copy: `store` to read from disk, `litdata` to stream during training.
        """
        if not isinstance(datamodule, TextDataModule):
            raise UserError(f"prepare needs a TextDataModule, got a {type(datamodule).__name__}")
        if format == "litdata" and to is None:
            raise UserError("--format litdata writes a folder of its own: pass --to FOLDER")
        store = datamodule.prepare()
        if to is not None:
            target = Path(to).expanduser()
            store = streaming.write(store, target) if format == "litdata" else store.copy(target)
        tokens = ", ".join(f"{name} {store.tokens[name]:,}" for name in store.tokens)
        print(f"Prepared: {files.shown(store.folder)} (tokens: {tokens}; vocabulary of {store.tokenizer.vocab_size:,})")
        print(f"  {program()} {join(['fit', '--data.corpus', files.shown(store.folder)])}")

    def validate(self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Score a checkpoint on the validation text.

        Args:
            ckpt_path: A file, a run's folder, or `best` or `last` of the newest run that has one.
        """
        super().validate(model, datamodule=datamodule, verbose=False)
        self._print_metrics()

    def test(self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Score a checkpoint on the test text, with non-overlapping and with sliding windows.

        Args:
            ckpt_path: A file, a run's folder, or `best` or `last` of the newest run that has one.
        """
        super().test(model, datamodule=datamodule, verbose=False)
        self._print_metrics()

    def predict(  # type: ignore[override]
        self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None, output: str | None = None
    ) -> None:
        """Generate text from a checkpoint.

        Args:
            ckpt_path: A file, a run's folder, or `best` or `last` of the newest run that has one.
            output: JSON Lines file for the texts, with tokens, log-probabilities and seeds; null prints them.
        """
        super().predict(model, datamodule=datamodule, return_predictions=False)

    def _print_metrics(self) -> None:
        if self.is_global_zero:
            if not self.callback_metrics:
                print("Nothing was scored")
            for name, value in sorted(self.callback_metrics.items()):
                print(f"{name:<28}{value.item():>12.6g}")


def print_summary(
    trainer: RunTrainer, model: LanguageModel, datamodule: LightningDataModule, resumed_step: int | None
) -> None:
    """Print the best checkpoint's path and score, a text sample, and the commands to run next."""
    keeper = next((one for one in trainer.checkpoint_callbacks if isinstance(one, BestLastCheckpoint)), None)
    step = trainer.global_step
    if trainer.fast_dev_run or keeper is None:  # type: ignore[attr-defined]  # set outside __init__
        print("Nothing was saved")
        return
    if step == resumed_step:
        print(f"The run had already reached step {step}: to train longer, pass a larger --trainer.max_steps")
        return
    if not keeper.best_model_path:
        where = f"; the weights are in {files.shown(keeper.last_model_path)}" if keeper.last_model_path else ""
        print(f"No validation was run{where}")
        if step and trainer.enable_validation:
            print("  To validate during a short run, lower --trainer.val_check_interval")
        return
    path = files.shown(keeper.best_model_path)
    best = checkpoints.read(path)
    print(f"\nBest checkpoint: {path} (step {best['global_step']})")
    metrics = best[checkpoints.METADATA_KEY].get("metrics", {})
    name, unit = ("val/nats_per_char", "character") if "val/nats_per_char" in metrics else ("val/loss", "token")
    nats = metrics.get(name, keeper.best_score)  # without metrics if a subclass has its own validation
    text = "tuning" if model.settings.get("data", {}).get("validate_on") == "tune" else "validation"
    print(f"  {nats:.4f} nats per {unit}, {nats / math.log(2):.4f} bits per {unit} on the {text} text")
    final = trainer.callback_metrics.get(name)
    if final is not None and f"{final:.4f}" != f"{nats:.4f}":  # the best was an earlier one
        print(f"  {final:.4f} nats per {unit} at the last validation")
    if keeper.validated_step is not None and (later := step - keeper.validated_step):
        print(f"  last.ckpt, the final model, was not scored: it is {counted(later, 'step')} past the last validation")
    if not isinstance(datamodule, TextDataModule):
        return
    if datamodule.trainer is None:  # another process trained, as with `ddp_spawn`
        datamodule.prepare_data()
        datamodule.setup("fit")
    elif step < model.total_steps:
        print(f"  Stopped at step {step} of {model.total_steps}; to resume: {resume_command(keeper.last_model_path)}")
    prompt = datamodule.sample_prompt
    text = LanguageModel.load_from_checkpoint(path).generate(prompt, max_new_tokens=150)
    print(f"\n{escape_control_characters(text)}\n")
    prompts = json.dumps([prompt], ensure_ascii=False)
    kinds = {"--model.net": checkpoints.net_class(best), "--data.tokenizer": type(datamodule.tokenizer)}
    named = [(flag, full_name(kind)) for flag, kind in kinds.items()]
    own = [word for flag, name in named if not name.startswith("lmlight.") for word in (flag, name)]
    words = ["predict", "--ckpt_path", path, *own, "--data.prompts", prompts]
    print(f"Next:\n  {program()} {join(words)}")
    if isinstance(trainer.logger, RunLogger):
        print(f"  {program('tensorboard')} {join(['--logdir', files.shown(trainer.logger.root_dir)])}")


class TimeLimit(Timer):
    """`trainer.max_time`, counted from the start of training in this process; Lightning's Timer adds earlier processes."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class SaveConfig(Callback):
    """Writes `config.yaml` into the run's folder at the first batch: a refused resume leaves the old file unchanged."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._is_saved = False

    # not earlier: other callbacks and the model may refuse the run in `on_train_start`
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._is_saved:
            return
        self._is_saved = True
        folder = Path(str(trainer.log_dir))  # on every rank, because it is broadcast
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with files.whole(folder / CONFIG) as beside:
                # ASCII, because jsonargparse reads it in the locale's encoding, which is not UTF-8 on Windows
                beside.write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="ascii")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the folders of a run that failed before it began; `rmdir` removes only empty ones."""
        assert isinstance(trainer, RunTrainer)
        if trainer.run_folder and trainer.is_global_zero:
            with suppress(OSError):
                Path(trainer.run_folder).rmdir()
                Path(trainer.run_folder).parent.rmdir()


def quiet() -> None:
    """Hide Lightning's tips, and print warnings on one line each."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # the report of `--trainer.profiler simple`
    tips = "does not have many workers|number of training batches|callbacks used to create|sync_dist|LeafSpec"
    warnings.filterwarnings("ignore", message=f".*({tips})")
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"lmlight: warning: {' '.join(str(message).split())}\n"
