"""The command line: `lmlight fit | prepare | validate | test | predict`, on Lightning's CLI.

- A checkpoint's settings are read as the first `--config` file, so later files and flags win over them.
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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lmlight import __version__, callbacks
from lmlight import checkpoint as checkpoints
from lmlight.callbacks import RunLogger, RunProgress, WritePredictions
from lmlight.data import streaming
from lmlight.data.datamodule import TextDataModule
from lmlight.errors import UserError, say
from lmlight.generation import printable
from lmlight.models import NETS, Bigram, Transformer, chosen  # noqa: F401  (so that --model.net Bigram needs no full path)
from lmlight.module import LanguageModel
from lmlight.reliability import CheckpointFiles, KeepCheckpoints

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "val_check_interval": 100,
    "check_val_every_n_epoch": None,  # validation counts steps, not epochs
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data splits itself among the ranks
    "logger": {"class_path": "lmlight.callbacks.RunLogger"},
    "default_root_dir": "runs",
}
CKPT_PATH = "A checkpoint: its file, its run's folder, or `best` or `last`, those of the newest run that has one."
# Classes that a checkpoint's settings may name; anything else would be imported, that is, run, on its word alone.
TRUSTED_CLASSES = ("lmlight.", "torch.optim.")


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, where argparse would print a screen of usage first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog.replace(' [options]', '')} --help`")


class PreparingTrainer(Trainer):
    """Lightning's, with one more method, which becomes a subcommand: so it reads the very settings that `fit` reads."""

    def prepare(
        self,
        model: LanguageModel,
        datamodule: TextDataModule,
        part: str | None = None,
        to: str | None = None,
        format: Literal["store", "litdata"] = "store",
    ) -> None:
        """Prepares a text, so that training on it begins at once: trains the tokenizer and encodes, as fit would.

        Args:
            model: not used.
            datamodule: whose text is prepared.
            part: `3/16` encodes only this job's share, the fourth of sixteen, for they count from 0; null does all of it.
                The last one that is done puts them together.
            to: a folder for a copy of the result, which `--data.corpus` takes in place of the text; null leaves it in the
                cache.
            format: of that copy: `store` to be read from a disk, `litdata` to be streamed while training.
        """
        share = _part(part)
        if format == "litdata" and to is None:
            raise UserError("--format litdata writes a folder of its own: pass --to FOLDER")
        store = datamodule.prepare(share)
        if store is None:
            print(f"Part {part} is done; others are not: with the last one the text is prepared")
            return
        if to is not None:
            target = Path(to).expanduser()
            store = streaming.write(store, target) if format == "litdata" else store.copy(target)
        tokens = ", ".join(f"{name} {store.tokens[name]:,}" for name in store.tokens)
        print(f"Prepared: {os.path.relpath(store.folder)} (tokens: {tokens}; {store.tokenizer.vocab_size:,} pieces)")
        print(f"  {_command()} fit --data.corpus {os.path.relpath(store.folder)}")


def _part(part: str | None) -> tuple[int, int]:
    """`3/16` as numbers; all of it where it is None."""
    if part is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--part must be such as 0/16 to 15/16, got '{part}'")
    return int(found[1]), int(found[2])


class LmlightCLI(LightningCLI):
    """Lightning's CLI with lmlight's defaults, checkpoints that bring their settings, and a summary at the end of fit."""

    checkpoint: dict[str, Any] | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        ours = {"weights_only", "verbose", "return_predictions"}  # see _prepare_subcommand_kwargs
        theirs = LightningCLI.subcommands()
        fit = {"fit": theirs.pop("fit"), "prepare": {"model", "datamodule"}}
        return {name: skip | ours for name, skip in (fit | theirs).items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for target in ("data.seed", "model.seed", "model.sampling.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)
        watching = [LearningRateMonitor, *callbacks.DEFAULT]
        names = [{"class_path": f"{kind.__module__}.{kind.__name__}"} for kind in watching]
        parser.set_defaults({"trainer.callbacks": names})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":  # Lightning's own words are of what it does without us
                action.help = CKPT_PATH + (" Its run goes on where it was written." if subcommand == "fit" else "")
        if subcommand in ("fit", "prepare"):
            parser.add_argument(
                "--init_from",
                type=str | None,
                help="Finetune: begin with the net, weights and tokenizer of this checkpoint, and with all else afresh. "
                "(--ckpt_path goes on with a run instead: optimizer, schedule, position in the text.)",
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
        self.config = parser.parse_args([word for word in args if not word.startswith("--print_config")])
        name, config = self.config.subcommand, self.config[self.config.subcommand]
        init_from, ckpt_path = config.get("init_from"), config.get("ckpt_path")
        if ckpt_path is None and init_from is None:
            self.config = parser.parse_args(args)
            if name not in ("fit", "prepare"):
                raise UserError(f"{name} needs a model: --ckpt_path best, or runs/.../checkpoints/best.ckpt")
            return
        if ckpt_path is not None and init_from is not None:
            raise UserError("--ckpt_path goes on with a run and --init_from begins a new one: pass one of them")

        resuming = name == "fit" and init_from is None
        path = checkpoints.find(ckpt_path or init_from, _runs_folder(config), "last" if resuming else "best")
        self.checkpoint = checkpoints.read(path)
        if resuming and "optimizer_states" not in self.checkpoint:
            raise UserError(f"checkpoint '{path}' was imported and holds no run to go on with: pass it as --init_from")
        settings = _settings_of(self.checkpoint, path)
        if init_from is not None:
            settings = {
                "model": {"net": settings["model"]["net"]},
                "data": {"block_size": settings["data"]["block_size"]},
            }
        run = path.absolute().parents[1]
        if resuming and run.parent == _runs_folder(config).absolute():  # go on in the run's own folder
            arguments = {"version": run.name, "purge_step": self.checkpoint["global_step"]}
            settings["trainer"] = {"logger": {"class_path": "lmlight.callbacks.RunLogger", "init_args": arguments}}
        at = args.index(name) + 1
        self.config = parser.parse_args([*args[:at], f"--config={json.dumps(settings)}", *args[at:]])
        if init_from is None:
            self.config[name].ckpt_path = str(path)

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
        super().instantiate_classes()
        self.model.check_net(self.datamodule.block_size)
        if self.checkpoint is not None:
            self.model.tokenizer = self.datamodule.tokenizer = checkpoints.tokenizer_of(self.checkpoint)
            self.model.block_size = self.checkpoint[checkpoints.KEY]["net"]["config"]["block_size"]
            if self.config[self.subcommand].get("init_from"):
                self.model.init_from = self.checkpoint
        dump = json.loads(self._parser(self.subcommand).dump(self.config[self.subcommand], format="json"))
        self.model.settings = {section: dump[section] for section in ("seed_everything", "model", "data")}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand == "prepare":  # nothing is trained, whatever machine the settings are for
            return self.trainer_class(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        plugins = trainer_config["plugins"] or []
        trainer_config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), CheckpointFiles()]
        if not trainer_config["logger"]:  # LearningRateMonitor refuses to have nowhere to log to
            kept = trainer_config["callbacks"] or []
            trainer_config["callbacks"] = [kind for kind in kept if not isinstance(kind, LearningRateMonitor)]
        ours: list[Callback] = []
        if self.subcommand == "fit":
            if trainer_config["enable_checkpointing"] is not False:
                if not any(isinstance(callback, KeepCheckpoints) for callback in trainer_config["callbacks"] or []):
                    ours.append(KeepCheckpoints())
                if not trainer_config["logger"] and getattr(rank_zero_only, "rank", 0) == 0:
                    # the logger makes a run's folder; without it, runs would write over each other's checkpoints
                    trainer_config["default_root_dir"] = str(
                        checkpoints.new_run(Path(trainer_config["default_root_dir"]))
                    )
            if trainer_config["enable_progress_bar"] is not False:
                ours.append(RunProgress())
        elif self.subcommand == "predict":
            ours.append(WritePredictions(self.config[self.subcommand].output))
        return self._instantiate_trainer(trainer_config, ours)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        ours: dict[str, Any] = {} if subcommand == "prepare" else {"weights_only": True}
        if subcommand in ("validate", "test"):
            ours["verbose"] = False  # the figures are printed by after_validate and after_test
        if subcommand == "predict":
            ours["return_predictions"] = False  # WritePredictions has them
        return super()._prepare_subcommand_kwargs(subcommand) | ours

    @rank_zero_only
    def after_fit(self) -> None:
        """Says where the best checkpoint lies, what it reached, what it writes, and what to type next."""
        keeper = self.trainer.checkpoint_callback
        if not isinstance(keeper, KeepCheckpoints):
            return
        if keeper.best_score is None:
            print(f"No validation was run: stopped at step {self.trainer.global_step}")
            return
        path = os.path.relpath(keeper.best_model_path)
        best, nats = checkpoints.read(path), keeper.best_score
        model = LanguageModel.load_from_checkpoint(path)
        print(f"\nBest checkpoint: {path} (step {best['global_step']})")
        print(f"  {nats:.4f} nats per character, {nats / math.log(2):.4f} bits per character on the validation text")
        final = self.trainer.callback_metrics.get("val/nats_per_char")
        if final is not None:
            print(f"  {final:.4f} nats per character at the last validation")
        opening = self.datamodule.opening
        print(f"\n{printable(model.generate(opening, max_new_tokens=150))}\n")
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


def _command() -> str:
    """What to type for `lmlight` where this process was started: its environment may not be activated."""
    typed = Path(sys.argv[0])
    if typed.stem != "lmlight":  # python -m lmlight, or a notebook
        return f"{sys.executable} -m lmlight"
    found = shutil.which("lmlight")
    return "lmlight" if found and Path(found).resolve() == typed.resolve() else os.path.relpath(typed)


def _runs_folder(config: Any) -> Path:
    """Where this command's runs lie: the logger's folder."""
    logger = config.trainer.logger
    if isinstance(logger, list) and logger:
        logger = logger[0]
    arguments = logger.get("init_args") if hasattr(logger, "get") else None
    return Path((arguments and arguments.get("save_dir")) or config.trainer.default_root_dir or "runs")


def _settings_of(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings that a checkpoint brings: those of its run, and always its net.

    Raises:
        UserError: they name a class that is neither lmlight's nor torch's.
    """
    described = checkpoint[checkpoints.KEY]
    settings = copy.deepcopy(described["settings"])
    net = chosen(described["net"]["config"])
    class_path = f"{NETS[described['net']['class']].__module__}.{described['net']['class']}"
    settings.setdefault("model", {})["net"] = {"class_path": class_path, "init_args": net}
    for name in ("prompts", "prompt_batch_size", "cache"):  # of another command or machine
        settings.setdefault("data", {}).pop(name, None)
    block_size = described["net"]["config"]["block_size"]  # fewer than were asked for, where the text was short
    settings["data"]["block_size"] = min(settings["data"].get("block_size", block_size), block_size)
    for name in _class_paths(settings):
        if not name.startswith(TRUSTED_CLASSES):
            raise UserError(f"checkpoint '{path}' wants to run {name}, which is neither lmlight's nor torch's: refused")
    return settings


def _class_paths(settings: Any) -> list[str]:
    if isinstance(settings, dict):
        own = [str(settings["class_path"])] if "class_path" in settings else []
        return own + [name for value in settings.values() for name in _class_paths(value)]
    if isinstance(settings, list):
        return [name for value in settings for name in _class_paths(value)]
    return []


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
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"lmlight: warning: {message}\n"


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
            trainer_class=PreparingTrainer,
            args=list(sys.argv[1:] if args is None else args),
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "lmlight",
                "description": "Trains small transformer language models on text. Beside the subcommands below there are "
                "`lmlight chat`, `curves`, `export`, `import` and `cache`, each with a --help of its own.",
                "version": __version__,
            },
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except (UserError, MisconfigurationException) as error:
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
