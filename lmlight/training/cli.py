"""The command line: `lmlight fit | prepare | validate | test | predict`, on Lightning's CLI.

- Resuming reads the `config.yaml` of the run's folder, other commands the settings inside the checkpoint. Either stands for
  the first `--config` file, so later files and flags win over it.
- The tokenizer goes from a checkpoint to the data and the model here, and nowhere else.
- A user's mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, Timer, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from lmlight import __version__, files
from lmlight import checkpoint as checkpoints
from lmlight.command_line import COMMANDS, unknown
from lmlight.data import streaming
from lmlight.errors import UserError, say
from lmlight.generation import escape_control_characters
from lmlight.models import NETS, Bigram, Transformer, architecture_kwargs  # noqa: F401  (so that --model.net Bigram needs no full path)
from lmlight.optim import Muon
from lmlight.training import callbacks
from lmlight.training.callbacks import RunLogger, RunProgress, WritePredictions
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "val_check_interval": 100,
    "check_val_every_n_epoch": None,  # validation counts steps, not epochs
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data splits itself among the ranks
    "logger": {"class_path": "lmlight.training.callbacks.RunLogger"},
    "default_root_dir": "runs",
}
CKPT_PATH = "Checkpoint: a file, a run's folder, or `best` or `last` of the newest run that has one."
CONFIG = "config.yaml"  # of a run's folder: its settings
# Classes that a checkpoint's settings may name. Importing a module runs it, so a file cannot name any other.
TRUSTED_CLASSES = ("lmlight.", "torch.optim.")
# Settings of the sections `model` and `trainer` that are plain text, whatever they hold.
PLAIN_TEXT = ("default_root_dir", "save_dir", "dirpath", "filename", "stop")
# Of our defaults, those that `Trainer(barebones=True)` refuses.
BAREBONES_REFUSES = ("log_every_n_steps", "enable_model_summary", "num_sanity_val_steps")
# Flags that say where the checkpoint of a run is.
WHERE_FLAGS = ("--ckpt_path", "--trainer.default_root_dir", "--trainer.logger.save_dir")
# Settings of a command, not of a run: a resumed run does not take them from its config.yaml. `max_time` limits one process.
NOT_RESUMED = ("config", "ckpt_path", "trainer.max_time")


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, where argparse would print a screen of usage first; and shows the flags of the default
    network and optimizer, which the parser itself only does on `--model.net.help`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if found := re.search(r"argument subcommand: invalid choice: '(.*?)'", message):
            raise unknown(found[1])
        hint = "" if message.endswith("--help`") else f"; see `{self.prog.replace(' [options]', '')} --help`"
        raise UserError(f"{message}{hint}")

    def format_help(self, *args: Any) -> str:
        text = super().format_help(*args)
        at = text.find("\nLightning's Trainer:\n")
        if at < 0:
            return text
        flags = OneLineParser(description="", add_help=False, usage=SUPPRESS)
        for name, kind, skip in (("net", Transformer, {"vocab_size", "block_size"}), ("optimizer", Muon, {"params"})):
            flags.add_class_arguments(kind, f"model.{name}", skip=skip)
        shown = re.sub(r"  --model\.\w+ CONFIG\b.*\n( {24}.*\n)*", "", flags.format_help())
        return f"{text[:at]}\n{shown.strip()}\n{text[at:]}"


class RunTrainer(Trainer):
    """Lightning's Trainer.

    Its runs have a folder of their own. `prepare` is a method, which `LightningCLI` makes a subcommand: so it reads the very
    settings that `fit` reads.
    """

    run_folder: str | None = None  # known once `log_dir` has been asked for, by all ranks together

    @property
    def log_dir(self) -> str:
        """The run's folder, whichever loggers there are: its config, checkpoints and curve are in it."""
        if self.run_folder is None:
            made: str | None = str(self.default_root_dir)
            if ours := next((logger for logger in self.loggers if isinstance(logger, RunLogger)), None):
                made = ours.log_dir
            elif self.state.fn == "fit" and not self._leaves_nothing and self.is_global_zero:
                made = str(checkpoints.make_run_dir(Path(self.default_root_dir)))
            self.run_folder = str(self.strategy.broadcast(made))
        return self.run_folder

    @property
    def _leaves_nothing(self) -> bool:
        return bool(self.fast_dev_run or self.barebones)  # type: ignore[attr-defined]  # set late

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that a strategy has spawned, where Lightning would be as talkative as ever."""
        self.__dict__.update(state)
        _quiet()

    def prepare(
        self,
        model: LanguageModel,
        datamodule: TextDataModule,
        to: str | None = None,
        format: Literal["store", "litdata"] = "store",
    ) -> None:
        """Prepares a text, so that training on it begins at once: trains the tokenizer and encodes, as fit would.

        Args:
            model: not used.
            datamodule: whose text is prepared.
            to: a folder for a copy of the result, which `--data.corpus` takes in place of the text; null leaves it in the
                cache.
            format: of that copy: `store` to be read from a disk, `litdata` to be streamed while training.
        """
        if format == "litdata" and to is None:
            raise UserError("--format litdata writes a folder of its own: pass --to FOLDER")
        store = datamodule.prepare()
        if to is not None:
            target = Path(to).expanduser()
            store = streaming.write(store, target) if format == "litdata" else store.copy(target)
        tokens = ", ".join(f"{name} {store.tokens[name]:,}" for name in store.tokens)
        print(f"Prepared: {os.path.relpath(store.folder)} (tokens: {tokens}; {store.tokenizer.vocab_size:,} pieces)")
        print(f"  {_command()} fit --data.corpus {os.path.relpath(store.folder)}")


class TimeLimit(Timer):
    """`trainer.max_time`, counted from the start of this process: a resumed run gets all of it again.

    Lightning's own goes on counting from where the checkpoint was written, so a run that it ended could not be resumed.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, atomically, and only once training starts: a resume that is refused leaves
    the old file unchanged."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: Lightning's would write here."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, RunTrainer)
        folder = Path(trainer.log_dir)  # on every rank, because it is broadcast
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with files.whole(folder / CONFIG) as beside:
                beside.write_text(self.parser.dump(self.config, skip_unset=False), encoding="utf-8")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that failed before it began leaves no folders: `rmdir` takes empty ones alone."""
        assert isinstance(trainer, RunTrainer)
        if trainer.run_folder and trainer.is_global_zero:
            with suppress(OSError):
                Path(trainer.run_folder).rmdir()
                Path(trainer.run_folder).parent.rmdir()


class LmlightCLI(LightningCLI):
    """Lightning's CLI with lmlight's defaults, checkpoints that bring their settings, and a summary at the end of fit."""

    checkpoint: dict[str, Any] | None = None
    resumed: Path | None = None  # the folder of the run that is resumed in place
    resuming: str = ""
    finetuned_from: str | None = None  # the checkpoint with which the run began

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = {"weights_only", "verbose", "return_predictions"}  # see _prepare_subcommand_kwargs
        theirs = LightningCLI.subcommands()
        fit = {"fit": theirs.pop("fit"), "prepare": {"model", "datamodule"}}
        return {name: skip | ours for name, skip in (fit | theirs).items()}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(TextDataModule, "data")
        parser.add_lightning_class_args(LanguageModel, "model")
        # last, since its flags fill ten screens of help
        parser.add_lightning_class_args(RunTrainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for target in ("data.seed", "model.seed", "model.sampling.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)
        watching = [LearningRateMonitor, *callbacks.DEFAULT]
        names = [{"class_path": f"{kind.__module__}.{kind.__name__}"} for kind in watching]
        parser.set_defaults({"trainer.callbacks": names})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        kwargs |= {"description": COMMANDS[subcommand], "usage": f"lmlight {subcommand} [--config FILE] [options]"}
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":  # Lightning's own words are of what it does without us
                action.help = CKPT_PATH + (
                    " Resumes its run, with the run's own settings." if subcommand == "fit" else ""
                )
        if subcommand in ("fit", "prepare"):
            parser.add_argument(
                "--init_from",
                type=str | None,
                help="Finetune: start from the network, weights and tokenizer of this checkpoint; everything else is new. "
                "(--ckpt_path resumes a run instead: optimizer, schedule, position in the data.)",
            )
        if subcommand == "predict":
            parser.add_argument(
                "--output",
                type=str | None,
                help="A JSON Lines file for the texts, with tokens, log-probabilities and seeds; null prints them.",
            )
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        for name, parser in self._subcommand_parsers.items():
            if name != "fit":  # only training leaves a run behind; of the rest, the result is all there is to see
                parser.set_defaults(
                    {"trainer.logger": False, "trainer.callbacks": None, "trainer.enable_progress_bar": False}
                )

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:  # type: ignore[override]
        # first without --print_config: what that prints is to include the checkpoint's settings
        words = [word for word in args if not word.startswith("--print_config")]
        try:
            self.config = _parse(parser, words)
        except UserError:
            # a flag may fit only what the run has, such as its optimizer: look for the checkpoint without it
            where = [word for flag in WHERE_FLAGS for word in _flag(flag, words)]
            if "fit" not in words or not _flag("--ckpt_path", words):
                raise
            self.config = _parse(parser, ["fit", *where])
        name, config = self.config.subcommand, self.config[self.config.subcommand]
        if not 0 <= int(config.seed_everything) < 2**32:
            raise UserError(f"seed_everything must be in [0, 2**32), got {config.seed_everything}")
        init_from, ckpt_path = config.get("init_from"), config.get("ckpt_path")
        if "" in (init_from, ckpt_path):
            raise UserError(
                "--ckpt_path and --init_from need a checkpoint, and got an empty text: pass best, or a file"
            )
        if ckpt_path is None and init_from is None:
            self.config = _parse(parser, args)
            if name not in ("fit", "prepare"):
                raise UserError(f"{name} needs a model: --ckpt_path best, or runs/.../checkpoints/best.ckpt")
            return
        if ckpt_path is not None and init_from is not None:
            raise UserError("--ckpt_path resumes a run and --init_from starts a new one: pass only one")

        resuming = name == "fit" and init_from is None
        runs = _runs_folder(config)
        path = checkpoints.find(ckpt_path or init_from, runs, "last" if resuming else "best")
        self.checkpoint = checkpoints.read(path)
        run = path.absolute().parent.parent
        if resuming:
            if "optimizer_states" not in self.checkpoint:
                raise UserError(
                    f"checkpoint '{path}' has no optimizer state, so its run cannot be resumed: pass it as --init_from"
                )
            settings = _settings_of_run(run, run.parent.resolve() == runs.resolve(), path)
        else:
            settings = _settings_of(self.checkpoint, path)
        if init_from is not None:
            settings = {
                "model": {"net": settings["model"]["net"]},
                "data": {"block_size": settings["data"]["block_size"]},
            }
        self.finetuned_from = settings.pop("init_from", None) if init_from is None else str(path)
        at = args.index(name) + 1
        self.config = _parse(parser, [*args[:at], f"--config={json.dumps(settings)}", *args[at:]])
        if init_from is None:
            self.config[name].ckpt_path = str(path)
        if resuming:
            changed = _differences(settings, self._dump(name, skip_unset=False))
            if lost := [change for change in changed if change.startswith("data.tokenizer.")]:
                raise UserError(
                    f"the tokenizer of a run cannot change ({lost[0]}): leave that out, or start a new run without the "
                    "checkpoint"
                )
            if _runs_folder(self.config[name]) == _runs_folder(settings):  # else the user wants it in another place
                self.resumed = run
            self.resuming = f"Resuming {os.path.relpath(run)} at step {self.checkpoint['global_step']}"
            self.resuming += f", with {', '.join(changed)}" if changed else ""

    def _dump(self, subcommand: str | None, skip_unset: bool) -> dict[str, Any]:
        """The settings as plain values."""
        dump = self._parser(subcommand).dump(self.config[subcommand], skip_unset=skip_unset, format="json")
        settings: dict[str, Any] = json.loads(dump)
        return settings

    def _parse_ckpt_path(self) -> None:
        """Nothing: `parse_arguments` has read the checkpoint, and flags win over it."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.pop("config", None)
        # `--seed_everything true` draws one, after the links were made
        config.data.seed = config.model.seed = config.model.sampling.seed = int(config.seed_everything)
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand == "predict" and config.output and config.data.prompt_batch_size is None:
            config.data.prompt_batch_size = 32

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            if (mistake := _creation_error(error)) is None:
                raise
            raise mistake from error
        self.model.check_net(self.datamodule.block_size)
        if self.subcommand == "fit":
            self.model.check_run(self.trainer)  # as Lightning will have it do, but before a strategy launches processes
        if self.checkpoint is not None:
            self.model.tokenizer = self.datamodule.tokenizer = checkpoints.tokenizer_of(self.checkpoint)
            self.model.block_size = self.checkpoint[checkpoints.METADATA_KEY]["net"]["config"]["block_size"]
            if self.config[self.subcommand].get("init_from"):
                self.model.init_from = self.checkpoint
        if self.subcommand == "fit":
            # `config.yaml` is to start the same run again, not to resume this one
            config = self.config[self.subcommand]
            config.ckpt_path, config.init_from = None, self.finetuned_from
        dump = self._dump(self.subcommand, skip_unset=True)
        self.model.settings = {section: dump[section] for section in ("seed_everything", "model", "data")}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand == "prepare":  # nothing is trained, whatever machine the settings are for
            return self.trainer_class(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        plugins = trainer_config["plugins"] or []
        trainer_config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        given = trainer_config["callbacks"] or []
        trainer_config["callbacks"] = given if isinstance(given, list) else [given]
        if self.subcommand == "fit":
            self._prepare_fit(trainer_config)
        given = trainer_config["callbacks"]
        if not trainer_config["logger"]:  # LearningRateMonitor refuses to have nowhere to log to
            given = [callback for callback in given if not isinstance(callback, LearningRateMonitor)]
        ours: list[Callback] = []
        if self.subcommand == "fit":
            trial = trainer_config["fast_dev_run"] or trainer_config["enable_checkpointing"] is False
            keepers = [callback for callback in given if isinstance(callback, BestLastCheckpoint)]
            if not trial:
                # last, so that what it saves has the state of any ModelCheckpoint that is beside it
                given = [*(one for one in given if one not in keepers), *(keepers or [BestLastCheckpoint()])]
            theirs = any(isinstance(callback, ProgressBar) for callback in given)
            if trainer_config["enable_progress_bar"] is not False and not theirs:
                ours.append(RunProgress())
            if max_time := trainer_config.pop("max_time"):
                ours.append(TimeLimit(max_time))
        elif self.subcommand == "predict":
            ours.append(WritePredictions(self.config[self.subcommand].output))
        # last at the end of a validation, where it takes the averaged weights away: the others are to see them
        averaging = [callback for callback in given if isinstance(callback, WeightAveraging)]
        trainer_config["callbacks"] = [callback for callback in given if callback not in averaging]
        try:
            trainer = self._instantiate_trainer(trainer_config, [*ours, *averaging])
        except (TypeError, ValueError, ImportError, NotImplementedError) as error:  # Lightning's, about its arguments
            raise UserError(str(error)) from error
        assert isinstance(trainer, RunTrainer)
        trainer.run_folder = str(self.resumed) if self.resumed else None
        return trainer

    def _prepare_fit(self, trainer_config: dict[str, Any]) -> None:
        """Tells RunLogger where the run's folder is, or leaves out what `barebones` does without."""
        loggers = trainer_config["logger"]
        trainer_config["default_root_dir"] = trainer_config["default_root_dir"] or "runs"
        several = loggers if isinstance(loggers, list) else [loggers]
        ours = [logger for logger in several if isinstance(logger, RunLogger)]
        if trainer_config["barebones"]:
            # Lightning refuses what costs time, so our defaults go; it refuses what the user asked for in one line
            off = {name: value for name, value in TRAINER_DEFAULTS.items() if name in BAREBONES_REFUSES}
            trainer_config |= {name: None for name, value in off.items() if trainer_config[name] == value}
            trainer_config["logger"] = None if ours else loggers
            watching = (LearningRateMonitor, *callbacks.DEFAULT)
            given = trainer_config["callbacks"]
            trainer_config["callbacks"] = [callback for callback in given if not isinstance(callback, watching)]
            trainer_config["enable_progress_bar"] = trainer_config["enable_checkpointing"] = False
            self.save_config_callback = None
        elif ours and not trainer_config["fast_dev_run"]:
            where: dict[str, Any] = {"save_dir": str(_runs_folder(self.config[self.subcommand]))}
            if self.resumed and self.checkpoint:
                step = self.checkpoint["global_step"]
                where = {"save_dir": str(self.resumed.parent), "version": self.resumed.name, "purge_step": step}
            trainer_config["logger"] = [type(logger)(**where) if logger in ours else logger for logger in several]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        ours: dict[str, Any] = {} if subcommand == "prepare" else {"weights_only": True}
        if subcommand in ("validate", "test"):
            ours["verbose"] = False  # the figures are printed by after_validate and after_test
        if subcommand == "predict":
            ours["return_predictions"] = False  # WritePredictions has them
        return super()._prepare_subcommand_kwargs(subcommand) | ours

    @rank_zero_only
    def before_fit(self) -> None:
        """Says which run is resumed, and which of its settings are not what they were."""
        if self.resuming:
            print(self.resuming)

    @rank_zero_only
    def after_fit(self) -> None:
        """Says where the best checkpoint lies, what it reached, what it writes, and what to type next."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # set late
            print("This was a trial run (trainer.fast_dev_run): nothing was saved")
            return
        keepers = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, BestLastCheckpoint)]
        if not keepers:
            print("No checkpoints were kept")
            return
        keeper = keepers[0]
        step = self.trainer.global_step
        if self.checkpoint and self.resuming and step == self.checkpoint["global_step"]:
            print(f"The run had already reached step {step}: to train longer, pass a larger --trainer.max_steps")
            return
        if not keeper.best_model_path:
            where = f"; the weights are in {os.path.relpath(keeper.last_model_path)}" if keeper.last_model_path else ""
            print(f"No validation was run{where}")
            return
        path = os.path.relpath(keeper.best_model_path)
        best = checkpoints.read(path)
        # not `keeper.best_score`: with `ddp_spawn`, the keeper that knows it was in another process
        nats = best["callbacks"][keeper.state_key]["best_score"]
        model = LanguageModel.load_from_checkpoint(path)
        print(f"\nBest checkpoint: {path} (step {best['global_step']})")
        print(f"  {nats:.4f} nats per character, {nats / math.log(2):.4f} bits per character on the validation text")
        final = self.trainer.callback_metrics.get("val/nats_per_char")
        if final is not None:
            print(f"  {final:.4f} nats per character at the last validation")
        if self.datamodule.trainer is None:  # other processes had it, as with `ddp_spawn`
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        elif step < self.model.total_steps:
            resume = f"{_command()} fit --ckpt_path {os.path.relpath(keeper.last_model_path)}"
            print(f"  Stopped at step {step} of {self.model.total_steps}; to resume: {resume}")
        opening = self.datamodule.sample_prompt
        print(f"\n{escape_control_characters(model.generate(opening, max_new_tokens=150))}\n")
        prompts = shlex.quote(json.dumps([opening], ensure_ascii=False))
        print(f"Next:\n  {_command()} predict --ckpt_path {path} --data.prompts {prompts}")
        if isinstance(self.trainer.logger, RunLogger):
            tensorboard = Path(_command()).with_name("tensorboard")  # where lmlight is
            print(f"  {tensorboard} --logdir {os.path.relpath(self.trainer.logger.root_dir)}")

    @rank_zero_only
    def after_validate(self) -> None:
        """Prints the figures, one a line."""
        for name, value in sorted(self.trainer.callback_metrics.items()):
            print(f"{name:<28}{value.item():>12.6g}")

    after_test = after_validate


def _parse(parser: LightningArgumentParser, args: Sequence[str]) -> Namespace:
    """The settings, with plain text where a default of Lightning's is a member of an enumeration, which the parser could not
    write to a file again."""

    def plain(value: Any) -> Any:
        if isinstance(value, Namespace):
            for name, inner in vars(value).items():
                setattr(value, name, plain(inner))
        elif isinstance(value, list):
            return [plain(inner) for inner in value]
        return str(value.value) if isinstance(value, Enum) and isinstance(value, str) else value

    settings: Namespace = plain(parser.parse_args(args))
    return settings


def _flag(name: str, words: Sequence[str]) -> list[str]:
    """A flag and its value, as `--name=value` or as two words; nothing if it is not there."""
    for at, word in enumerate(words):
        if word == name or word.startswith(f"{name}="):
            return list(words[at : at + (2 if word == name else 1)])
    return []


def _creation_error(error: Exception) -> Exception | None:
    """The user's mistake behind an error while classes are created: a value that a class refuses, or a missing library.

    The parser wraps the exception of a class in others, which name the class and list the types that it tried. None: not a
    mistake of the user's, as far as can be told.
    """
    named, cause = "", error
    while True:
        if found := re.search(r"given class_path '([^']+)'", str(cause)):
            named = found[1]
        if not isinstance(cause.__cause__, Exception):
            break
        cause = cause.__cause__
    if isinstance(cause, (UserError, MisconfigurationException)):
        return cause
    if named:
        return UserError(f"{named} cannot be created: {str(cause) or type(cause).__name__}")
    return UserError(str(cause)) if isinstance(cause, (ValueError, ImportError, NotImplementedError)) else None


def _raised_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised it: that is how it refuses settings, as often as by a `MisconfigurationException`."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__", "")).startswith("lightning.")


def _command() -> str:
    """What to type for `lmlight` where this process was started: its environment may not be activated."""
    typed = Path(sys.argv[0])
    if typed.stem != "lmlight":  # python -m lmlight, or a notebook
        return f"{sys.executable} -m lmlight"
    found = shutil.which("lmlight")
    return "lmlight" if found and Path(found).resolve() == typed.resolve() else os.path.relpath(typed)


def _runs_folder(config: Any) -> Path:
    """The folder of all runs, by the settings of a command or of a run."""
    logger = config["trainer"]["logger"]
    for one in logger if isinstance(logger, list) else [logger]:
        if hasattr(one, "get") and one["class_path"].endswith(".RunLogger") and one["init_args"].get("save_dir"):
            return Path(one["init_args"]["save_dir"])
    return Path(config["trainer"]["default_root_dir"] or "runs")


def _settings_of_run(run: Path, ours: bool, checkpoint: Path) -> dict[str, Any]:
    """The settings in a run's `config.yaml`, without those of the command that wrote it.

    Args:
        run: the run's folder.
        ours: whether it is in the command's folder of runs, and so trusted like a file passed with `--config`.
        checkpoint: the checkpoint to resume, for messages.

    Raises:
        UserError: there is no such file, or it is damaged; one from elsewhere names a class that is not lmlight's,
            Lightning's or torch's.
    """
    path = run / CONFIG
    try:
        if checkpoint.parent.name != checkpoints.FOLDER:  # whatever a folder above may hold, it is not a run's
            raise FileNotFoundError
        settings = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"cannot resume '{checkpoint}': the run's settings, '{path}', are missing; put them there, or start a new run "
            "from its weights with --init_from"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "not YAML"
        raise UserError(f"the run's settings '{path}' cannot be read ({reason}): restore the file") from None
    if not isinstance(settings, dict):
        raise UserError(f"the run's settings '{path}' hold no settings: restore the file")
    foreign = _named_code(settings, (*TRUSTED_CLASSES, "lightning."))
    if foreign and not ours:
        raise UserError(
            f"'{path}' names {foreign[0]}, which would be imported or read: if you trust that run, pass "
            f"--trainer.default_root_dir {run.parent}"
        )
    for name in NOT_RESUMED:
        section, _, last = name.rpartition(".")
        (settings.get(section) or {} if section else settings).pop(last, None)
    return settings


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that are not as they were, as `name: old -> new`."""
    changed = []
    for name, old in before.items():
        new = after.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("class_path") == new.get("class_path"):
            changed += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            changed.append(f"{prefix}{name}: {_brief(old)} -> {_brief(new)}")
    return [line.replace(".init_args.", ".") for line in changed]


def _brief(value: Any) -> str:
    """A setting in few characters: a class by its name."""
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return json.dumps(value, ensure_ascii=False)


def _settings_of(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings that a checkpoint brings: those of its run, and always its net.

    Raises:
        UserError: they name a class that is neither lmlight's nor torch's.
    """
    described = checkpoint[checkpoints.METADATA_KEY]
    settings = copy.deepcopy(described["settings"])
    net = architecture_kwargs(described["net"]["config"])
    class_path = f"{NETS[described['net']['class']].__module__}.{described['net']['class']}"
    sampling = {name: value for name, value in described["sampling"].items() if name != "seed"}  # that is the command's
    settings["model"] = {
        **settings.get("model", {}),
        "net": {"class_path": class_path, "init_args": net},
        "sampling": sampling,
    }
    for name in ("prompts", "prompt_batch_size", "cache"):  # of another command or machine
        settings.setdefault("data", {}).pop(name, None)
    block_size = described["net"]["config"]["block_size"]  # fewer than were asked for, where the text was short
    settings["data"]["block_size"] = min(settings["data"].get("block_size", block_size), block_size)
    if named := _named_code(settings, TRUSTED_CLASSES):
        raise UserError(f"checkpoint '{path}' wants to run {named[0]}, which is neither lmlight's nor torch's: refused")
    return settings


def _named_code(settings: dict[str, Any], trusted: tuple[str, ...]) -> list[str]:
    """The texts in a file's settings that the parser could import, or read as a file of settings, and that are not trusted.

    A class or function may be named by `class_path`, or by itself where one is expected, as in `model.optimizer: my.Class`;
    and a file may stand for any section. `data` has nothing but plain values.
    """
    importable = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

    def named(value: Any, key: str) -> list[str]:
        if isinstance(value, dict):
            return [name for inner, content in value.items() for name in named(content, inner)]
        if isinstance(value, list):
            return [name for content in value for name in named(content, key)]
        if not isinstance(value, str) or key in PLAIN_TEXT or value.startswith(trusted):
            return []
        return [value] if importable.fullmatch(value) or Path(value).is_file() else []

    sections = ("data", "model", "trainer")
    whole = [str(settings[section]) for section in sections if not isinstance(settings.get(section, {}), dict)]
    return whole + [name for section in sections[1:] for name in named(settings.get(section, {}), section)]


def _quiet() -> None:
    """Keeps Lightning's tips and our own warnings to what a user can act on, one line each."""
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


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: the words after `lmlight`; None takes them from the process.

    Returns:
        the exit status: 0, or 2 for a user's mistake, which is said in one line on stderr.
    """
    _quiet()
    try:
        LmlightCLI(
            LanguageModel,
            TextDataModule,
            trainer_class=RunTrainer,
            args=list(sys.argv[1:] if args is None else args),
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            save_config_callback=SaveConfig,
            parser_kwargs={
                "prog": "lmlight",
                "version": __version__,
            },
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        if not (isinstance(error, (UserError, MisconfigurationException)) or _raised_by_lightning(error)):
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if getattr(rank_zero_only, "rank", 0) == 0:
            say(error)
        return 2
    except KeyboardInterrupt:  # while `prepare` is at work; Lightning ends what it runs by itself
        return 130
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            return 130  # Lightning ends with 1
        raise
    return 0
