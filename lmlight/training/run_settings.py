"""Where a command's settings come from: the run or checkpoint that it names.

- `fit --ckpt_path` resumes a run with the settings in the `config.yaml` of its folder.
- Other commands take the network, sampling defaults and data settings from the checkpoint, where they are plain values.
  `--init_from` takes only the network and its block size.

Either acts as the first `--config` file, so later files and flags override it.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lmlight import checkpoint as checkpoints
from lmlight.command_line import Parser, join, program
from lmlight.errors import UserError, reason
from lmlight.models import Net, architecture_kwargs
from lmlight.user_code import full_name, is_class_name

CONFIG = "config.yaml"  # in a run's folder
RUNS = "runs"  # the default folder of all runs
# flags that locate the checkpoint whose settings are the defaults
LOCATING = ("ckpt_path", "init_from", "trainer.default_root_dir")
# flags that may name a user-defined class
CLASSES = ("model", "data", "model.net", "model.optimizer", "data.tokenizer")


class Source(NamedTuple):
    """The checkpoint that a command starts from; empty if it names none."""

    settings: dict[str, Any]  # those that it contributes
    path: Path | None = None
    is_found: bool = False  # `path` was resolved from `best`, `last` or a folder
    content: dict[str, Any] | None = None  # from `checkpoint.read`
    run: Path | None = None  # the folder of the run to resume
    step: int | None = None  # where to resume it


def find_source(command: str, args: Sequence[str]) -> tuple[Source, dict[str, str], list[str]]:
    """Find the checkpoint and the classes that flags or `--config` files name.

    Returns:
        The checkpoint; the classes, keyed by flag (`CLASSES`); and the arguments for the parser: config files first, and
        each class before the flags for its own arguments, because naming a class resets them.

    Raises:
        UserError: There is no such checkpoint or class, or it cannot be used for this command.
    """
    parser = Parser(f"lmlight {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    for name in (*LOCATING, *CLASSES):
        parser.add_argument(f"--{name}", dest=name)
    known, rest = parser.parse_known_args(args)
    flags = {name: value for name, value in vars(known).items() if value is not None}
    configs = flags.pop("config")
    for name in CLASSES:
        if (file := Path(str(flags.get(name)))).suffix == ".py":
            raise UserError(f"--{name} {file}: expected a class in the file, such as {file.stem}.MyClass")
    given: dict[str, Any] = {}
    for config in configs:
        try:
            loaded = yaml.safe_load(Path(config).expanduser().read_text("utf-8"))
        except (OSError, TypeError, ValueError, yaml.YAMLError):
            continue  # reported when the whole command line is parsed
        given |= flatten(_checked(loaded, config))
    for name in ("model", "data"):
        if any(word.partition("=")[0] == f"--{name}_class" for word in rest):
            raise UserError(f"{name}_class is for config files: on the command line, pass --{name} my.module.MyClass")
    trained = flags.get("data.tokenizer", given.get("data.tokenizer"))
    is_pretrained = isinstance(trained, str) and (is_class_name(trained) or trained.endswith((".json", ".model")))
    if is_pretrained and (wrong := [word for word in rest if word.startswith("--data.tokenizer.")]):
        flag = wrong[0].partition("=")[0]  # it would replace the tokenizer
        raise UserError(f"--data.tokenizer {trained} is used as it is: leave out {flag}, which is for training one")
    sections = [f"--{name}={flags.pop(name)}" for name in CLASSES if name in flags and not is_class_name(flags[name])]
    given |= flags
    classes = named_classes(given)
    net, tokenizer = checkpoints.import_classes(classes.get("model.net"), classes.get("data.tokenizer"))
    classes |= {name: full_name(kind) for name, kind in (("model.net", net), ("data.tokenizer", tokenizer)) if kind}
    source = _source(command, given, net)
    stored = _section(_section(source.settings, "model"), "net")
    if net is not None and str(stored.get("class_path")).rpartition(".")[2] == net.__name__:
        stored["class_path"] = full_name(net)  # its module may have been moved since the run began
    words = [f"--config={config}" for config in configs]
    words += [
        f"--{name}={classes[name]}" for name in ("model.net", "data.tokenizer", "model.optimizer") if name in classes
    ]
    classes = named_classes(flatten(source.settings)) | classes
    words += [f"--{name}_class={classes[name]}" for name in ("model", "data") if name in classes]
    words += [*sections, *rest, *(f"--{name}={flags[name]}" for name in LOCATING if name in flags)]
    return source, classes, words


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to a dict by flag; a `class_path` is the value of the flag that selects the class."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            flat[prefix.removesuffix(".") if name == "class_path" else f"{prefix}{name}"] = value
    return flat


def named_classes(settings: dict[str, Any]) -> dict[str, str]:
    """The classes that flattened settings name, keyed by flag (`CLASSES`)."""
    named = {name: settings.get(name) or settings.get(f"{name}_class") for name in CLASSES}
    return {name: value for name, value in named.items() if isinstance(value, str) and is_class_name(value)}


def _checked(settings: Any, file: object) -> dict[str, Any]:
    """Refuse a file without settings, and numbers and lists in place of a section, which the parser would ignore."""
    if not isinstance(settings, dict):
        raise UserError(
            f"'{file}': expected settings, got {'nothing' if settings is None else f'a {type(settings).__name__}'}"
        )
    for name in ("model", "data", "trainer"):
        if isinstance(value := settings.get(name), (int, float, list)):
            raise UserError(f"'{file}': expected settings in {name}, got {value}")
    return settings


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the settings; empty if it is not a mapping, which the parser reports later."""
    section = settings.get(name)
    return section if isinstance(section, dict) else {}


def _source(command: str, given: dict[str, Any], net: type[Net] | None) -> Source:
    ckpt_path, init_from = given.get("ckpt_path"), given.get("init_from")
    if "" in (init_from, ckpt_path):
        raise UserError("--ckpt_path and --init_from need a checkpoint, but got an empty string: pass best, or a file")
    if ckpt_path is not None and init_from is not None:
        raise UserError("--ckpt_path resumes a run and --init_from starts a new one: pass only one")
    name = init_from if ckpt_path is None else ckpt_path
    if not isinstance(name, str):  # the parser reports values of other types
        return Source({})
    runs = Path(str(given.get("trainer.default_root_dir") or RUNS)).expanduser()
    resumes = command == "fit" and init_from is None
    path = checkpoints.find(name, runs, "last" if resumes else "best")
    is_found = path != Path(name).expanduser()
    content = checkpoints.read(path)
    if resumes:
        run = path.absolute().parent.parent
        return Source(_from_run(path, content, runs), path, is_found, content, run, content["global_step"])
    settings = _from_checkpoint(content, checkpoints.net_class(content, net), init_from is not None)
    return Source(settings, path, is_found, content)


def _from_checkpoint(content: dict[str, Any], kind: type[Net], only_net: bool) -> dict[str, Any]:
    metadata = content[checkpoints.METADATA_KEY]
    config = metadata["net"]["config"]
    net = {"class_path": full_name(kind), "init_args": architecture_kwargs(config)}
    block_size = config["block_size"]
    if only_net:
        return {"model": {"net": net}, "data": {"block_size": block_size}}
    sampling = dict(metadata["sampling"])
    seed = {"seed_everything": sampling.pop("seed")} if "seed" in sampling else {}
    # for other commands, or for one machine; the tokenizer is stored separately
    left_out = ("prompts", "prompt_batch_size", "cache", "seed", "tokenizer")
    data = {name: value for name, value in metadata["settings"].get("data", {}).items() if name not in left_out}
    data.setdefault("block_size", block_size)  # a checkpoint trained from Python has no settings
    return {**seed, "model": {"net": net, "sampling": sampling}, "data": data}


def _from_run(checkpoint: Path, content: dict[str, Any], runs: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint belongs to, which may name any class to import."""
    if "optimizer_states" not in content:
        raise UserError(f"checkpoint '{checkpoint}' has no optimizer state to resume from: pass it as --init_from")
    run = checkpoint.absolute().parent.parent
    settings = None
    if checkpoint.parent.name == checkpoints.FOLDER:
        with suppress(OSError, ValueError, yaml.YAMLError):
            settings = yaml.safe_load((run / CONFIG).read_text("utf-8"))
    if not isinstance(settings, dict):
        raise UserError(
            f"cannot resume '{checkpoint}': the run's settings, '{run / CONFIG}', are missing or damaged; restore them, or "
            "start a new run from its weights with --init_from"
        )
    if run.parent.resolve() != runs.resolve():
        raise UserError(
            f"the run '{run}' is not in the folder of runs, '{runs}', and its {CONFIG} could name code to import: if you "
            f"trust it, pass --trainer.default_root_dir {run.parent}"
        )
    _checked(settings, run / CONFIG).pop("ckpt_path", None)
    _section(settings, "trainer").pop("max_time", None)  # it limits one process
    return settings


def scores_text_read_by(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a run with data settings `now` scores text that a model with data settings `before` was trained on."""
    corpus = before.get("corpus")
    longer = corpus == now.get("corpus") and _end(before) > _end(now)
    return corpus is not None and (longer or corpus in (now.get("val_corpus"), now.get("test_corpus")))


def _end(data: dict[str, Any]) -> float:
    """Where the training split of the corpus ends, as a share of its characters."""
    kept = 1 - float(data.get("val_fraction", 0.1))
    return (1.0 if data.get("val_corpus") else kept) * (kept if data.get("validate_on") == "tune" else 1.0)


def make_run_dir(runs: Path) -> Path:
    """Create a run's folder, named after the time and unique even if two processes start at once."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            folder = runs / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
            number += 1
    except OSError as error:
        raise UserError(
            f"the run's folder cannot be made in '{runs}' ({reason(error)}): pass another --trainer.default_root_dir"
        ) from None


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


def resume_command(checkpoint: str) -> str:
    """The shell command that resumes the run of a checkpoint."""
    runs = Path(checkpoint).absolute().parents[2]
    where = [] if runs == Path(RUNS).absolute() else ["--trainer.default_root_dir", str(runs)]
    return f"{program()} {join(['fit', '--ckpt_path', checkpoint, *where])}"
