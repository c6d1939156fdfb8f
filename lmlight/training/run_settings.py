"""Where a command's settings come from: which run or checkpoint it names, and what that contributes.

- `fit --ckpt_path` resumes a run with the settings in the `config.yaml` of its folder.
- Other commands take network, sampling defaults and data settings from the checkpoint itself, which holds plain values only.

Either stands for the first `--config` file, so later files and flags override it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lmlight import checkpoint as checkpoints
from lmlight.command_line import Parser
from lmlight.errors import UserError
from lmlight.models import Net, architecture_kwargs
from lmlight.user_code import full_name, import_class

CONFIG = "config.yaml"  # in a run's folder
# Classes that a config.yaml from elsewhere may name. Importing any other module would run it.
TRUSTED_CLASSES = ("lmlight.", "torch.optim.", "lightning.")
# Settings of the sections `model` and `trainer` that are plain text, whatever they hold.
PLAIN_TEXT = ("default_root_dir", "save_dir", "dirpath", "filename", "stop")
# Settings of one command, not of the run. `max_time` limits one process.
NOT_RESUMED = ("config", "ckpt_path", "trainer.max_time")
# Flags, also in `--config` files, that decide which settings the others start from.
LOCATING = ("ckpt_path", "init_from", "trainer.default_root_dir", "trainer.logger.save_dir")
# Flags that name a class whose constructor's arguments are flags, too.
CLASSES = ("model", "data", "model.net")


class Words(NamedTuple):
    """A command line, taken apart."""

    command: str
    configs: list[str]  # values of --config
    located: dict[str, str | None]  # by `LOCATING`
    classes: dict[str, str]  # by `CLASSES`, from flags and --config files
    rest: list[str]  # other flags
    runs: Path  # the folder of all runs


@dataclass(frozen=True)
class Source:
    """The checkpoint that a command starts from.

    Attributes:
        path: The file.
        content: From `checkpoint.read`.
        settings: What it contributes to the command's settings.
        run: The run's folder if it is resumed in place.
    """

    path: Path
    content: dict[str, Any]
    settings: dict[str, Any]
    run: Path | None = None


def take_apart(args: Sequence[str], commands: Sequence[str]) -> Words | None:
    """Find the flags of `LOCATING` before the others are parsed; None without one of the commands."""
    parser = Parser("lmlight", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    for name in (*LOCATING, *CLASSES):
        parser.add_argument(f"--{name}", dest=name)
    known, rest = parser.parse_known_args(args)
    flags = vars(known)
    configs = flags.pop("config")
    if not rest or rest[0] not in commands:
        return None
    given: dict[str, Any] = {}
    for config in configs:
        with suppress(OSError, ValueError, yaml.YAMLError):  # reported when it is parsed
            path = Path(config).expanduser()
            content = yaml.safe_load(path.read_text("utf-8") if path.is_file() else config)
            given |= content if isinstance(content, dict) else {}
    located = {name: given.get(name) for name in ("ckpt_path", "init_from")}
    located |= {name: flags[name] for name in LOCATING if flags[name] is not None}
    runs = located.get("trainer.logger.save_dir") or located.get("trainer.default_root_dir")
    words = [rest[0], *(f"--{name}={flags[name]}" for name in CLASSES if _is_file(flags[name])), *rest[1:]]
    classes = named_classes(given) | {
        name: flags[name] for name in CLASSES if flags[name] and not _is_file(flags[name])
    }
    return Words(words[0], configs, located, classes, words[1:], Path(runs) if runs else runs_folder(given))


def _is_file(value: str | None) -> bool:
    return value is not None and Path(value).is_file()


def named_classes(settings: dict[str, Any]) -> dict[str, str]:
    """The classes that settings name, by `CLASSES`."""
    net = (settings.get("model") or {}).get("net")
    named = {"model": settings.get("model_class"), "data": settings.get("data_class")}
    named["model.net"] = net.get("class_path") if isinstance(net, dict) else net
    return {name: value for name, value in named.items() if isinstance(value, str)}


def runs_folder(settings: Any) -> Path:
    """The folder of all runs, given the settings of a command or a run."""
    trainer: Any = settings.get("trainer") or {}
    folder, loggers = trainer.get("default_root_dir") or "runs", trainer.get("logger")
    logger: Any
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if hasattr(logger, "get") and str(logger["class_path"]).endswith("RunLogger"):
            folder = (logger.get("init_args") or {}).get("save_dir") or folder
    return Path(folder)


def locate(words: Words) -> Source | None:
    """The checkpoint that a command line names; None if it names none.

    Raises:
        UserError: There is none of this name, or it cannot be used for this command.
    """
    ckpt_path, init_from = words.located.get("ckpt_path"), words.located.get("init_from")
    if "" in (init_from, ckpt_path):
        raise UserError("--ckpt_path and --init_from need a checkpoint, and got an empty text: pass best, or a file")
    if ckpt_path is not None and init_from is not None:
        raise UserError("--ckpt_path resumes a run and --init_from starts a new one: pass only one")
    if ckpt_path is None and init_from is None:
        return None
    resuming = words.command == "fit" and ckpt_path is not None
    path = checkpoints.find(ckpt_path or init_from or "", words.runs, "last" if resuming else "best")
    content = checkpoints.read(path)
    if not resuming:
        named = words.classes.get("model.net")
        net = checkpoints.net_class(content, import_class("--model.net", named, Net) if named else None)
        return Source(path, content, _from_checkpoint(content, net, only_net=init_from is not None))
    if "optimizer_states" not in content:
        raise UserError(
            f"checkpoint '{path}' has no optimizer state, so its run cannot be resumed: pass it as --init_from"
        )
    run = path.absolute().parent.parent
    trusted = run.parent.resolve() == words.runs.resolve()
    settings = _from_run(run, trusted, path, words.classes.values())
    return Source(path, content, settings, run)


def _from_checkpoint(content: dict[str, Any], kind: type[Net], only_net: bool) -> dict[str, Any]:
    metadata = content[checkpoints.METADATA_KEY]
    net = {"class_path": full_name(kind), "init_args": architecture_kwargs(metadata["net"]["config"])}
    block_size = metadata["net"]["config"]["block_size"]  # smaller than requested if the text was short
    if only_net:
        return {"model": {"net": net}, "data": {"block_size": block_size}}
    sampling = dict(metadata["sampling"])
    seed = sampling.pop("seed", None)
    left_out = ("prompts", "prompt_batch_size", "cache", "seed")  # of another command, machine or flag
    data = {name: value for name, value in metadata["settings"].get("data", {}).items() if name not in left_out}
    data["block_size"] = min(data.get("block_size", block_size), block_size)
    settings = {"model": {"net": net, "sampling": sampling}, "data": data}
    return settings if seed is None else {"seed_everything": seed, **settings}


def _from_run(run: Path, trusted: bool, checkpoint: Path, named: Iterable[str]) -> dict[str, Any]:
    """The settings in a run's `config.yaml`.

    Args:
        run: The run's folder.
        trusted: Whether it lies in the command's folder of runs, and is trusted like a file passed with `--config`.
        checkpoint: The checkpoint to resume, for messages.
        named: Classes that the command names itself.

    Raises:
        UserError: The file is missing or damaged, or it is not trusted and names a class outside `TRUSTED_CLASSES`.
    """
    path = run / CONFIG
    try:
        if checkpoint.parent.name != checkpoints.FOLDER:  # the checkpoint does not lie in a run's folder
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
    if not trusted and (others := [name for name in named_code(settings) if name not in named]):
        raise UserError(
            f"'{path}' names {others[0]}, which would be imported or read: if you trust that run, pass "
            f"--trainer.default_root_dir {run.parent}"
        )
    for name in NOT_RESUMED:
        section, _, last = name.rpartition(".")
        (settings.get(section) or {} if section else settings).pop(last, None)
    return settings


def named_code(settings: dict[str, Any]) -> list[str]:
    """Untrusted values that the parser could import, or read as a file of settings.

    A class or function may be named by `class_path`, or directly, as in `model.optimizer: my.Class`; and a file may stand
    for any section. `data` holds plain values only.
    """
    importable = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

    def named(value: Any, key: str) -> list[str]:
        if isinstance(value, dict):
            return [name for inner, content in value.items() for name in named(content, inner)]
        if isinstance(value, list):
            return [name for content in value for name in named(content, key)]
        if not isinstance(value, str) or key in PLAIN_TEXT or value.startswith(TRUSTED_CLASSES):
            return []
        return [value] if importable.fullmatch(value) or Path(value).is_file() else []

    sections = ("data", "model", "trainer")
    whole = [str(settings[section]) for section in sections if not isinstance(settings.get(section, {}), dict)]
    classes = [name for key in ("model_class", "data_class") for name in named(settings.get(key), key)]
    return whole + classes + [name for section in sections[1:] for name in named(settings.get(section, {}), section)]


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Changed settings, each as `name: old -> new`."""
    changed = []
    for name, old in before.items():
        new = after.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("class_path") == new.get("class_path"):
            changed += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            changed.append(f"{prefix}{name}: {_brief(old)} -> {_brief(new)}")
    return [line.replace(".init_args.", ".") for line in changed]


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return json.dumps(value, ensure_ascii=False)
