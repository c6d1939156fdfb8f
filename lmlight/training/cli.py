"""The command line: `lmlight fit | prepare | validate | test | predict`, on Lightning's CLI.

A user error prints one line on stderr and exits with status 2.
"""

import json
import re
import sys
import traceback
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, NoReturn

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.errors import UserError, say
from lmlight.models import Transformer
from lmlight.optim import Muon
from lmlight.training import callbacks
from lmlight.training.callbacks import RunLogger, RunProgress
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import PYTHON_ONLY, LanguageModel
from lmlight.training.predictions import WritePredictions
from lmlight.training.run_checks import check_loggers
from lmlight.training.run_settings import RUNS, differences, find_source, scores_text_read_by
from lmlight.training.run_trainer import RunTrainer, SaveConfig, TimeLimit, print_summary, quiet
from lmlight.user_code import describe, full_name, import_class, user_frame

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1200,
    "val_check_interval": 100,
    "check_val_every_n_epoch": None,  # validation counts steps, not epochs
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    "logger": {"class_path": "lmlight.training.callbacks.RunLogger"},
    "default_root_dir": RUNS,
}


class OneLineParser(LightningArgumentParser):
    """Reports an error on one line, and lists the flags of the default network, tokenizer and optimizer in its help."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{_explain(message)}; see `{self.prog.replace(' [options]', '')} --help`")

    def format_help(self, *args: Any) -> str:
        before, trainer, after = super().format_help(*args).partition("\nLightning's Trainer:\n")
        if not trainer:
            return before
        flags = OneLineParser(description="", add_help=False, usage=SUPPRESS)
        flags.add_class_arguments(Transformer, "model.net", skip={"vocab_size", "block_size"})
        flags.add_class_arguments(TokenizerConfig, "data.tokenizer")
        flags.add_class_arguments(Muon, "model.optimizer", skip={"params"})
        shown = re.sub(r"  --model\.\w+ CONFIG\b.*\n( {24}.*\n)*", "", flags.format_help())
        return f"{before}\n{shown.strip()}\n{trainer}{after}"


def _explain(message: str) -> str:
    """Shorten a jsonargparse error message, which lists every type and parser it tried."""
    message = re.sub("; see `.*? --help`", "", message)  # added by a nested parser
    if not (key := re.search('Parser key "(.*?)":', message)):
        return message
    flag = f"--{key[1]}"
    if found := re.search("No module named '(.*?)'", message):
        return f"{flag}: there is no module {found[1]} in the current folder or among the installed packages"
    if found := re.search("(?:Option '|unrecognized arguments: --)(.*?)('|=|$)", message):
        return f"{flag} has no option {found[1]}"
    if found := re.search("arguments are required: (.*)", message):
        return f"{flag} needs {found[1]}: pass {', '.join(f'{flag}.{name}' for name in found[1].split(', '))}"
    if found := re.search("dot import path string: (.*)|has no attribute '(.*?)'", message):
        return f"{flag}: there is no class {found[1] or found[2]}"
    if found := re.search(r"--([\w.]+)(: expected .*, got .*)", message):  # explained by an inner parser
        return f"{flag}.{found[1]}{found[2]}"
    expected = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing.Literal\[(.*)\])", message)
    if expected and (got := re.search("(?:Got|Given) value: (.*)", message)):
        return f"{flag}: expected {' or '.join(a or b for a, b in expected).replace('NoneType', 'null')}, got {got[1]}"
    return message.replace(key[0], f"{flag}:")


class LmlightCLI(LightningCLI):
    """Lightning's CLI with lmlight's defaults, and with the settings that a checkpoint or its run contributes.

    Its arguments are a command, which is a method of `RunTrainer`, and that command's flags.
    """

    def __init__(self, args: Sequence[str]) -> None:
        quiet()
        # Lightning has enumeration members as defaults, such as those of its Timer
        yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
        self.command, *rest = args
        self.source, self.named, words = find_source(self.command, rest)
        # fully qualified: a user's class may have the same name as the default one
        defaults = {"model": full_name(LanguageModel), "data": full_name(TextDataModule)}
        named = defaults | self.named
        model = import_class("--model", named["model"], LanguageModel)
        data = import_class("--data", named["data"], LightningDataModule)
        self.has_text = issubclass(data, TextDataModule)
        if self.source.run is None and not self.has_text:
            self.source.settings.pop("data", None)  # `TextDataModule`'s
        if self.source.settings:
            words.insert(0, f"--config={json.dumps(self.source.settings)}")
        usage = f"lmlight {self.command} [--config FILE] [options]"
        super().__init__(
            model,
            data,
            args=[self.command, *words],
            trainer_class=RunTrainer,
            seed_everything_default=1337,
            save_config_callback=None,
            parser_class=OneLineParser,
            parser_kwargs={"prog": "lmlight", self.command: {"usage": usage}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self.command: {"model", "datamodule"}}  # only this one: a parser takes a tenth of a second to build

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert self.model_class is not None and self.datamodule_class is not None
        parser.add_lightning_class_args(self.datamodule_class, "data")
        parser.add_class_arguments(self.model_class, "model", skip=PYTHON_ONLY, fail_untyped=False, sub_configs=True)
        for name, base in (("model", "LanguageModel"), ("data", "LightningDataModule")):
            help = f"Your own subclass of {base}, such as my.module.MyClass. On the command line, pass --{name}."
            parser.add_argument(f"--{name}_class", type=str | None, default=None, help=help)
        # last, because its flags fill ten screens of help
        parser.add_lightning_class_args(RunTrainer, "trainer")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for target in ("model.seed", "model.sampling.seed", *(["data.seed"] if self.has_text else [])):
            try:
                parser.link_arguments("seed_everything", target, compute_fn=int)
            except ValueError:  # there is no such argument
                name = self.named[target.partition(".")[0]]
                raise UserError(f"{name}.__init__ must take **kwargs and call super().__init__(**kwargs)") from None
        watching = [full_name(kind) for kind in (LearningRateMonitor, *callbacks.DEFAULT)]
        defaults = {**TRAINER_DEFAULTS, "callbacks": [{"class_path": path} for path in watching]}
        # TextDataModule divides its windows among the ranks itself; a sampler would change the order of predicted texts
        defaults["use_distributed_sampler"] = not self.has_text and self.command != "predict"
        if self.command != "fit":  # the others print their result or write it to a file
            defaults |= {"logger": False, "callbacks": None, "enable_progress_bar": False}
        parser.set_defaults({f"trainer.{name}": value for name, value in defaults.items()})
        for name in self.named.keys() & {"model.net", "model.optimizer"}:
            with suppress(Exception):  # reported when the command line is parsed
                # otherwise, arguments shared with the default class would keep the default class's values
                parser.set_defaults({name: {"class_path": self.named[name]}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:  # type: ignore[override]
        self.config = parser.parse_args(args)
        config = self.config[self.command]
        if self.source.path is None and self.command not in ("fit", "prepare"):
            raise UserError(f"{self.command} needs a model: pass --ckpt_path best, or runs/.../checkpoints/best.ckpt")
        if config.get("init_from") and self.source.run is None:
            config.init_from = str(self.source.path)
        # reset, because Lightning would read settings from the checkpoint and `--config config.yaml` would resume the run
        if "ckpt_path" in config:
            config.ckpt_path = None

    def before_instantiate_classes(self) -> None:
        config = self.config[self.command]
        config.pop("config", None)
        # `--seed_everything true` became a number after the links were made
        config.model.seed = config.model.sampling.seed = int(config.seed_everything)
        if self.has_text:
            config.data.seed = config.model.seed
        dump = self.parser.dump(self.config, skip_unset=False, skip_link_targets=False, format="json")
        self.settings: dict[str, Any] = json.loads(dump)[self.command]

    def instantiate_classes(self) -> None:
        extra: dict[str, Any] = {"init_from": self.source.content, "settings": self.settings}
        make_model = partial(_make_model, extra)  # no closure, which `ddp_spawn` could not pickle
        self.config_init = self.parser.instantiate(self.config, instantiators=[(make_model, LanguageModel, True)])
        extra.clear()  # the parser keeps a reference to it
        self.datamodule, self.model = (self.config_init[self.command][name] for name in ("data", "model"))
        if not hasattr(self.datamodule, "trainer"):
            raise UserError(f"{type(self.datamodule).__name__}.__init__ must call super().__init__()")
        self.trainer = self.instantiate_trainer()
        # as Lightning will do, but before a strategy launches processes
        trainer = self.trainer if self.command == "fit" else None
        self.model.check(getattr(self.datamodule, "block_size", None), trainer)
        if trainer is not None and self.has_text:
            self.datamodule.check_batch_size(trainer)
        if self.source.content is not None:
            self._check_split(self.source.content)
            if self.has_text:
                self.datamodule.tokenizer = self.model.tokenizer
            self.source.content.clear()  # frees the memory of its optimizer's state
        if self.source.run is not None:
            self.config_init.fit.ckpt_path = str(self.source.path)

    def _check_split(self, content: dict[str, Any]) -> None:
        """Warn if a model was trained on text that is scored now."""
        before = content[checkpoints.METADATA_KEY]["settings"].get("data", {})
        now = self.settings.get("data") or {}
        if self.command == "test":
            now = {**now, "validate_on": "val", "val_corpus": now.get("test_corpus") or now.get("val_corpus")}
        elif self.command == "validate":
            now = {**now, "test_corpus": None}
        scores = self.command in ("validate", "test") or (self.command == "fit" and self.source.run is None)
        if scores and scores_text_read_by(before, now):
            rank_zero_warn(
                "the checkpoint was trained on some of the text to be scored, so its losses are too low: keep its "
                "data.val_fraction, data.val_corpus and data.validate_on"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.command == "prepare":  # no model is trained, so ignore the settings' devices
            return RunTrainer(accelerator="cpu", devices=1, logger=False, barebones=True)
        options = {**self.config_init[self.command].trainer, **kwargs}
        options["plugins"] = [*_as_list(options["plugins"]), AtomicCheckpointIO()]
        run = self.source.run
        where = (str(run.parent), run.name, self.source.step) if run else (options["default_root_dir"],)
        if options["barebones"]:  # which Lightning refuses to combine with our defaults
            options |= {"logger": False, "callbacks": None, "enable_progress_bar": False, "log_every_n_steps": 0}
        if not isinstance(options["logger"], bool):
            loggers = _as_list(options["logger"])
            options["logger"] = [RunLogger(*where) if isinstance(one, RunLogger) else one for one in loggers]
            check_loggers(_as_list(self.settings["trainer"]["logger"]))
        given: list[Callback] = _as_list(options["callbacks"])
        if not options["logger"]:  # LearningRateMonitor raises an error if there is no logger
            given = [callback for callback in given if not isinstance(callback, LearningRateMonitor)]
        if self.command == "fit":
            if max_time := options.pop("max_time"):
                given.append(TimeLimit(max_time))
            if options["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in given):
                given.append(RunProgress())
                options["enable_progress_bar"] = False  # not Lightning's
            if not (options["fast_dev_run"] or options["barebones"]):
                given.append(SaveConfig(self.settings))
                if options["enable_checkpointing"] is not False:
                    given += [] if any(isinstance(one, BestLastCheckpoint) for one in given) else [BestLastCheckpoint()]
        elif self.command == "predict":
            given.append(WritePredictions(self.config[self.command].output))
        # WeightAveraging comes after the callbacks that need the averaged weights, which it removes at the end of a
        # validation; then BestLastCheckpoint, whose file contains the state of any ModelCheckpoint.
        order = (BestLastCheckpoint, WeightAveraging)
        options["callbacks"] = sorted(given, key=lambda callback: [isinstance(callback, kind) for kind in order])
        trainer = RunTrainer(**options)
        trainer.run_folder = str(run) if run else None
        return trainer

    def before_fit(self) -> None:
        """Announce a resumed run, and refuse changes that its checkpoint rules out."""
        if self.source.run is None:
            self._name_checkpoint()
            return
        changed = differences(self.source.settings, self.settings)
        for name in ("data.tokenizer", "model.lr_scheduler"):  # the checkpoint has its state
            if lost := [change for change in changed if change.startswith((f"{name}.", f"{name}:"))]:
                raise UserError(f"a resumed run cannot change {name} ({lost[0]}): leave that out, or start a new run")
        if self.trainer.is_global_zero:
            changes = f", with {', '.join(changed)}" if changed else ""
            print(f"Resuming {files.shown(self.source.run)} at step {self.source.step}{changes}")

    def _name_checkpoint(self) -> None:
        """Print which file `best`, `last` or a folder stands for; on stderr, because stdout has the results."""
        if self.source.path is not None and self.source.is_found and self.trainer.is_global_zero:
            print(f"Checkpoint: {files.shown(self.source.path)}", file=sys.stderr)

    before_validate = before_test = before_predict = _name_checkpoint

    @rank_zero_only
    def after_fit(self) -> None:
        assert isinstance(self.trainer, RunTrainer)
        print_summary(self.trainer, self.model, self.datamodule, self.source.step)


def _make_model(extra: dict[str, Any], kind: type[LanguageModel], /, **flags: Any) -> LanguageModel:
    return kind(**flags, **extra)


def _as_list(value: Any) -> list[Any]:
    return value.copy() if isinstance(value, list) else [] if value is None else [value]


def _mistake(error: Exception) -> Exception:
    """Return the exception to report to the user; raise `error` again if it looks like a bug.

    jsonargparse wraps an exception that a class raises in its own exceptions, which name the class and list the types it
    tried. Lightning and torch's schedulers reject settings with a `MisconfigurationException` or a built-in exception.
    """
    chain = [error]
    while isinstance(chain[-1].__cause__, Exception):
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, (UserError, MisconfigurationException)):
            return cause
    if re.match(r"DataLoader worker \(pid.*\) (is killed|exited)", str(cause)):
        return UserError(f"{str(cause).splitlines()[0].strip()} Memory may have run out: lower --data.num_workers")
    if user_frame(cause):
        return UserError(f"an exception in your code: {describe(cause)}")
    if named := re.findall(r"given class_path '([^']+)'", " ".join(map(str, chain))):
        return UserError(f"{named[-1]} cannot be created: {str(cause) or type(cause).__name__}")
    module = str([*traceback.walk_tb(cause.__traceback__)][-1][0].f_globals.get("__name__", ""))
    if module == "multiprocessing.connection" and isinstance(cause, (ConnectionError, EOFError)):
        return UserError("a worker process was killed. Memory may have run out: lower --data.num_workers")
    built_in = (ValueError, TypeError, RuntimeError, ImportError, ArithmeticError)
    if module.startswith(("lightning.", "torch.optim.lr_scheduler")) and isinstance(cause, built_in):
        return cause
    raise error


class _Check(LmlightCLI):
    """Parses and checks a command line of `fit`, and does not run it."""

    def fit(self, **kwargs: Any) -> None: ...

    before_fit = after_fit = fit


def check_fit(args: Sequence[str]) -> dict[str, Any]:
    """Check `lmlight fit ARGS` as far as possible without data, and raise its `UserError`; returns all of its settings."""
    try:
        return _Check(["fit", *args]).settings
    except Exception as error:
        raise UserError(str(_mistake(error))) from None


def main(args: Sequence[str] | None = None) -> int:
    """Run `lmlight` with these arguments (default: `sys.argv[1:]`) and return the exit status."""
    try:
        LmlightCLI(sys.argv[1:] if args is None else args)
    except Exception as error:
        mistake = _mistake(error)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if getattr(rank_zero_only, "rank", 0) == 0:
            say(mistake)
        return 2
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, KeyboardInterrupt) or isinstance(end.__context__, KeyboardInterrupt):
            return 130  # Lightning exits with 1
        raise
    return 0
