"""The command line: `lmlight fit | prepare | validate | test | predict`, on Lightning's CLI.

A user's mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from argparse import SUPPRESS
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lmlight.command_line import COMMANDS, unknown
from lmlight.errors import UserError, say
from lmlight.models import Net, Transformer
from lmlight.optim import Muon
from lmlight.training import callbacks
from lmlight.training.callbacks import RunLogger, RunProgress, WritePredictions
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import PYTHON_ONLY, LanguageModel
from lmlight.training.run_settings import Source, differences, locate, named_classes, runs_folder, take_apart
from lmlight.training.run_trainer import RunTrainer, SaveConfig, TimeLimit, quiet
from lmlight.training.summary import print_summary
from lmlight.user_code import import_class
from lmlight.version import __version__

SUBCOMMANDS = ("fit", "prepare", "validate", "test", "predict")
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


class OneLineParser(LightningArgumentParser):
    """Reports an error in one line, and lists the flags of the default network and optimizer in its help.

    Args:
        command: The subcommand that it parses; empty for the main parser.
    """

    def __init__(self, *args: Any, command: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command = command

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if found := re.search(r"argument subcommand: invalid choice: '(.*?)'", message):
            raise unknown(found[1])
        hint = "" if message.endswith("--help`") else f"; see `{self.prog.replace(' [options]', '')} --help`"
        raise UserError(f"{message}{hint}")

    def format_help(self, *args: Any) -> str:
        before, trainer, after = super().format_help(*args).partition("\nLightning's Trainer:\n")
        if not trainer:
            return before
        flags = OneLineParser(description="", add_help=False, usage=SUPPRESS)
        flags.add_class_arguments(Transformer, "model.net", skip={"vocab_size", "block_size"})
        flags.add_class_arguments(Muon, "model.optimizer", skip={"params"})
        shown = re.sub(r"  --model\.\w+ CONFIG\b.*\n( {24}.*\n)*", "", flags.format_help())
        return f"{before}\n{shown.strip()}\n{trainer}{after}"


class LmlightCLI(LightningCLI):
    """Lightning's CLI with lmlight's defaults, and with the settings that a checkpoint or its run contributes."""

    parser: OneLineParser
    announcement = ""
    resumed_step: int | None = None

    def __init__(self, args: Sequence[str], **kwargs: Any) -> None:
        self.words = take_apart(args, SUBCOMMANDS)
        self.source = locate(self.words) if self.words else None
        classes = {
            **named_classes(self.source.settings if self.source else {}),
            **(self.words.classes if self.words else {}),
        }
        self.classes = {name: classes[name] for name in ("model", "data") if name in classes}
        model = (
            import_class("--model", self.classes["model"], LanguageModel) if "model" in self.classes else LanguageModel
        )
        data: type[LightningDataModule] = TextDataModule
        if "data" in self.classes:
            data = import_class("--data", self.classes["data"], LightningDataModule)
        if self.source is not None and self.source.run is None and not issubclass(data, TextDataModule):
            self.source.settings.pop("data", None)  # `TextDataModule`'s
        super().__init__(model, data, args=list(args), **kwargs)

    @property
    def _has_text(self) -> bool:
        """Whether the data are lmlight's."""
        return isinstance(self.datamodule_class, type) and issubclass(self.datamodule_class, TextDataModule)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: {"model", "datamodule"} for name in SUBCOMMANDS}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert self.model_class is not None and self.datamodule_class is not None
        parser.add_lightning_class_args(self.datamodule_class, "data")
        parser.add_class_arguments(self.model_class, "model", skip=PYTHON_ONLY, fail_untyped=False, sub_configs=True)
        for name, base in (("model", "LanguageModel"), ("data", "LightningDataModule")):
            help = f"Class derived from {base} to use, such as my.module.MyClass; on the command line: --{name}."
            parser.add_argument(f"--{name}_class", type=str | None, default=None, help=help)
        # last, because its flags fill ten screens of help
        parser.add_lightning_class_args(RunTrainer, "trainer")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, OneLineParser)
        for target in ("model.seed", "model.sampling.seed", *(["data.seed"] if self._has_text else [])):
            parser.link_arguments("seed_everything", target, compute_fn=int)
        default = [
            {"class_path": f"{kind.__module__}.{kind.__name__}"} for kind in (LearningRateMonitor, *callbacks.DEFAULT)
        ]
        defaults = {**TRAINER_DEFAULTS, "callbacks": default}
        if parser.command != "fit":  # the others leave no run behind: their result is on the terminal or in a file
            defaults |= {"logger": False, "callbacks": None, "enable_progress_bar": False}
        parser.set_defaults({f"trainer.{name}": value for name, value in defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:  # type: ignore[override]
        words = self.words
        if words is not None:
            settings = [json.dumps(self.source.settings)] if self.source else []
            named = {name: value for name, value in words.located.items() if value is not None}
            if self.source is not None:
                named["ckpt_path" if "ckpt_path" in named else "init_from"] = str(self.source.path)
            configs = [f"--config={config}" for config in (*settings, *words.configs)]
            # a class before the flags for its arguments, which it would reset
            classes = [f"--{name}_class={value}" for name, value in self.classes.items()]
            if net := words.classes.get("model.net"):
                import_class("--model.net", net, Net)
                classes.append(f"--model.net={net}")
            args = [
                words.command,
                *configs,
                *classes,
                *words.rest,
                *(f"--{name}={value}" for name, value in named.items()),
            ]
        self.config = _plain(parser.parse_args(args))
        command, config = self.config.subcommand, self.config[self.config.subcommand]
        if not 0 <= int(config.seed_everything) < 2**32:
            raise UserError(f"seed_everything must be in [0, 2**32), got {config.seed_everything}")
        if self.source is None and command not in ("fit", "prepare"):
            raise UserError(f"{command} needs a model: --ckpt_path best, or runs/.../checkpoints/best.ckpt")
        # Lightning would take settings from the checkpoint, and config.yaml is to start the same run again, not resume it
        if "ckpt_path" in config:
            config.ckpt_path = None

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.pop("config", None)
        # `--seed_everything true` has drawn one after the links were made
        config.model.seed = config.model.sampling.seed = int(config.seed_everything)
        if self._has_text:
            config.data.seed = config.model.seed
        if self.subcommand == "predict" and config.output and config.data.prompt_batch_size is None:
            config.data.prompt_batch_size = 32
        dump = self.parser.dump(self.config, skip_unset=False, skip_link_targets=False, format="json")
        self.settings: dict[str, Any] = json.loads(dump)[self.subcommand]
        if self.source is not None and self.source.run is not None:
            self._announce_resume(self.source)

    def _announce_resume(self, source: Source) -> None:
        """Check and remember what differs from the settings of the run."""
        changed = differences(source.settings, self.settings)
        if lost := [change for change in changed if change.startswith("data.tokenizer.")]:
            raise UserError(
                f"the tokenizer of a run cannot change ({lost[0]}): leave that out, or start a new run without the "
                "checkpoint"
            )
        self.resumed_step = source.content["global_step"]
        self.announcement = f"Resuming {os.path.relpath(str(source.run))} at step {self.resumed_step}"
        self.announcement += f", with {', '.join(changed)}" if changed else ""

    def instantiate_classes(self) -> None:
        content = self.source.content if self.source is not None else None
        make_model = _MakeModel(init_from=content, settings=self.settings)
        try:
            self.config_init = self.parser.instantiate(self.config, instantiators=[(make_model, LanguageModel, True)])
            self.datamodule, self.model = (self.config_init[self.subcommand][name] for name in ("data", "model"))
            self.trainer = self.instantiate_trainer()
        except Exception as error:
            if (mistake := _creation_error(error)) is None:
                raise
            raise mistake from error
        # as Lightning will do, but before a strategy launches processes
        self.model.check(
            getattr(self.datamodule, "block_size", None), self.trainer if self.subcommand == "fit" else None
        )
        if self.subcommand == "fit" and self.source is not None and self.source.run is not None:
            self.config_init.fit.ckpt_path = str(self.source.path)
        if content is not None and self._has_text:
            self.datamodule.tokenizer = self.model.tokenizer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand == "prepare":  # nothing is trained, whatever machine the settings are for
            return RunTrainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
        options = {**self.config_init[self.subcommand].trainer, **kwargs}
        options["plugins"] = [*_as_list(options["plugins"]), AtomicCheckpointIO()]
        loggers = _as_list(options["logger"])
        if any(isinstance(logger, RunLogger) for logger in loggers):
            options["logger"] = [self._in_run_folder(logger) for logger in loggers]
        given: list[Callback] = _as_list(options["callbacks"])
        if not options["logger"]:  # LearningRateMonitor refuses to have nowhere to log to
            given = [callback for callback in given if not isinstance(callback, LearningRateMonitor)]
        # averaging comes last at the end of a validation, where it takes the averaged weights away
        averaging: list[Callback] = [callback for callback in given if isinstance(callback, WeightAveraging)]
        keepers = [callback for callback in given if isinstance(callback, BestLastCheckpoint)]
        ours: list[Callback] = []
        if self.subcommand == "fit":
            options["default_root_dir"] = options["default_root_dir"] or "runs"
            has_bar = any(isinstance(callback, ProgressBar) for callback in given)
            if options["enable_progress_bar"] is not False and not has_bar:
                ours.append(RunProgress())
            if max_time := options.pop("max_time"):
                ours.append(TimeLimit(max_time))
            if options["fast_dev_run"] or options["enable_checkpointing"] is False:
                keepers = []
            else:  # the last checkpoint callback, so that it saves the state of any ModelCheckpoint
                keepers = keepers or [BestLastCheckpoint()]
            if not options["fast_dev_run"]:
                averaging.append(SaveConfig(self.settings))
        elif self.subcommand == "predict":
            ours.append(WritePredictions(self.config[self.subcommand].output))
        others = [callback for callback in given if not isinstance(callback, (WeightAveraging, BestLastCheckpoint))]
        options["callbacks"] = [*others, *ours, *averaging, *keepers]
        try:
            trainer = RunTrainer(**options)
        except (TypeError, ValueError, ImportError, NotImplementedError) as error:  # Lightning's, about its arguments
            raise UserError(str(error)) from error
        trainer.run_folder = str(self._resumed_in_place()) if self._resumed_in_place() else None
        return trainer

    def _resumed_in_place(self) -> Path | None:
        """The folder of the resumed run, unless the user wants it to continue in another folder of runs."""
        if self.source is None or self.source.run is None:
            return None
        return self.source.run if runs_folder(self.settings) == runs_folder(self.source.settings) else None

    def _in_run_folder(self, logger: Any) -> Any:
        if self.subcommand != "fit" or not isinstance(logger, RunLogger):
            return logger
        if run := self._resumed_in_place():
            return type(logger)(str(run.parent), run.name, purge_step=self.resumed_step)
        return type(logger)(str(runs_folder(self.settings)))

    @rank_zero_only
    def before_fit(self) -> None:
        if self.announcement:
            print(self.announcement)

    @rank_zero_only
    def after_fit(self) -> None:
        assert isinstance(self.trainer, RunTrainer)
        print_summary(self.trainer, self.model, self.datamodule, self.resumed_step)


class _MakeModel:
    """Passes arguments that are no flags; to one model, because the parser keeps a reference to this."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self, kind: type[LanguageModel], **flags: Any) -> LanguageModel:
        arguments, self.arguments = self.arguments, {}
        return kind(**flags, **arguments)


def _plain(value: Any) -> Any:
    """Replaces enumeration members, which Lightning has as defaults and the parser cannot write, by their text."""
    if isinstance(value, Namespace):
        for name, inner in vars(value).items():
            setattr(value, name, _plain(inner))
    elif isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value.value) if isinstance(value, Enum) and isinstance(value, str) else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _creation_error(error: Exception) -> Exception | None:
    """The user's mistake behind an error while classes are instantiated; None if it is not one, as far as we can tell.

    The parser wraps the exception of a class in others, which name the class and list the types that it tried.
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
    """Lightning refuses settings by a `MisconfigurationException`, and as often by a built-in exception."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__", "")).startswith("lightning.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: The words after `lmlight`; None takes them from the process.

    Returns:
        The exit status: 0, or 2 after a user's mistake, which is one line on stderr.
    """
    quiet()
    usage = "lmlight {} [--config FILE] [options]"
    parsers = {
        name: {"command": name, "description": COMMANDS[name].help, "usage": usage.format(name)} for name in SUBCOMMANDS
    }
    try:
        LmlightCLI(
            sys.argv[1:] if args is None else args,
            trainer_class=RunTrainer,
            seed_everything_default=1337,
            save_config_callback=None,
            parser_kwargs={"prog": "lmlight", "version": __version__, **parsers},
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
    except KeyboardInterrupt:  # during `prepare`; Lightning handles its own
        return 130
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            return 130  # Lightning exits with 1
        raise
    return 0
