"""Self-contained checkpoints: atomic writes, integrity check, weights-only loading. Does not import Lightning.

- A checkpoint is a Lightning checkpoint with one more entry, `lmlight`: the network's class and arguments, the tokenizer's
  bytes, and plain values. Together with the weights this is a complete model. Reading one never imports code.
- Writing is atomic: after a kill or on a full disk, the previous file is still there (`files.whole`).
- Reading verifies the CRC-32 of every member of the zip archive, which `torch.load` does not, and uses `weights_only=True`,
  which refuses pickles that would run code.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from lmlight import files
from lmlight.data.tokenizer import Tokenizer, deserialize, serialize
from lmlight.errors import UserError, reason
from lmlight.models import Net
from lmlight.user_code import import_class, subclasses
from lmlight.version import __version__

METADATA_KEY = "lmlight"
FORMAT_VERSION = 4  # incremented when older files can no longer be read
FOLDER = "checkpoints"  # inside a run's folder
NET_PREFIX = "net."  # of the network's weights in the LightningModule's state dict
ADAPTER = "lora_"  # in the names of adapter weights, following peft


def model_metadata(
    net: Net,
    tokenizer: Tokenizer | None,
    sampling: Mapping[str, Any] = {},
    settings: Mapping[str, Any] = {},
    optimizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The `lmlight` entry of a checkpoint. `LanguageModel` adds `metrics` if these weights have been validated.

    Args:
        net: The network; its class is stored by name.
        tokenizer: None if the data had none.
        sampling: Arguments of the model's `Sampling`.
        settings: Plain values; `data` holds the data module's arguments.
        optimizer: Class name and hyperparameters of the optimizer whose state the checkpoint holds.
    """
    return {
        "lmlight_version": __version__,
        "format_version": FORMAT_VERSION,
        "net": {"class": net.class_name, "config": net.config},
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "tokenizer": torch.frombuffer(bytearray(serialize(tokenizer)), dtype=torch.uint8) if tokenizer else None,
        "sampling": dict(sampling),
        "settings": dict(settings),
        "optimizer": optimizer,
    }


def write(content: dict[str, Any], path: str | Path) -> None:
    """Write tensors and plain values atomically, replacing the file at `path`. Its folder is created if needed.

    Raises:
        UserError: The disk is full or the folder is not writable. The previous file is unchanged.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as beside, beside.open("wb") as file:
            torch.save(content, file)
    except torch.AcceleratorError:  # a RuntimeError, too
        raise
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        cause = reason(error) if isinstance(error, OSError) else "the disk may be full"
        kept = "the previous file is unchanged" if path.exists() else "no file was written"
        raise UserError(
            f"checkpoint '{path}' cannot be written ({cause}): free some space, or check the folder's permissions; {kept}"
        ) from None


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, and add its absolute path as the entry `path`.

    Adapters are merged into the base model's weights.

    Raises:
        UserError: The file is missing or damaged, is not an lmlight checkpoint or has a different format version; it holds a
            pickle that would run code, or adapters for a model that is missing or has changed.
    """
    content = check(load(path), path)
    content["path"] = str(Path(path).expanduser().absolute())
    if (adapter := content[METADATA_KEY].get("adapter")) is not None:
        state, adapters = read_base(content)["state_dict"], content["state_dict"]
        for name, a in adapters.items():
            if name.endswith(f"{ADAPTER}A.default.weight"):
                b = adapters[name.replace(f"{ADAPTER}A.", f"{ADAPTER}B.")]
                merged = name.partition(ADAPTER)[0] + "weight"
                a, b = a.to(state[merged]), b.to(state[merged])
                state[merged] = torch.addmm(state[merged], b, a, alpha=adapter["scale"])
        content["state_dict"] = state
    return content


def read_base(content: dict[str, Any]) -> dict[str, Any]:
    """Read the base model of a checkpoint that holds adapters.

    Raises:
        UserError: See `read`; the base model is missing or has changed.
    """
    adapter = content[METADATA_KEY]["adapter"]
    base = adapter["base"]
    # checked before reading: a checkpoint that names itself as its base would be read without end
    if fingerprint(base) != adapter["fingerprint"]:
        raise UserError(
            f"the checkpoint holds adapters for '{base}', which is missing or has changed since: put that checkpoint back"
        )
    return read(base)


def fingerprint(path: str | Path) -> str:
    """The SHA-256 of the names and CRC-32s in a checkpoint's zip directory; empty if it is not a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = sorted((member.filename.partition("/")[2], member.CRC) for member in archive.infolist())
    except (OSError, zipfile.BadZipFile):
        return ""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load(path: str | Path) -> dict[str, Any]:
    """Read any file of tensors and plain values that torch wrote, onto the CPU.

    Raises:
        UserError: The file is missing, damaged, or holds a pickle that would run code.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            if not _is_intact(file):
                raise _damaged(path)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at '{path}': pass the path that `lmlight fit` printed") from None
    except OSError as error:
        raise UserError(
            f"checkpoint '{path}' cannot be read ({reason(error)}): pass the path of a .ckpt file"
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint '{path}' is refused: it holds more than tensors and plain values, and loading it could run code; "
            "pass one that lmlight wrote"
        ) from None
    except RuntimeError:  # the archive is intact, but torch did not write it
        raise _damaged(path) from None
    return content if isinstance(content, dict) else {}


def check(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return `content` if this version can read it.

    Raises:
        UserError: It is not an lmlight checkpoint, or has a different format version.
    """
    if METADATA_KEY not in content:
        raise UserError(f"'{path}' is not an lmlight checkpoint: pass one that `lmlight fit` wrote")
    metadata = content[METADATA_KEY]
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint '{path}' was written by lmlight {metadata.get('lmlight_version')} in format "
            f"{metadata.get('format_version')}, but lmlight {__version__} reads format {FORMAT_VERSION}: "
            "install the version that wrote it"
        )
    return content


def find(name: str | Path, runs: str | Path, prefer: Literal["best", "last"]) -> Path:
    """Resolve a checkpoint argument of the command line to a file.

    Args:
        name: A file; a run's folder or its `checkpoints` folder; or `best` or `last` of the newest run that has one.
        runs: The folder of all runs.
        prefer: Which checkpoint of a folder to take.

    Raises:
        UserError: A folder, or every run, has no such checkpoint. The path of a file is not checked.
    """
    path = Path(name).expanduser()
    if str(name) in ("best", "last"):
        found = _newest_first(Path(runs).expanduser().glob(f"*/{FOLDER}/{name}.ckpt"))
        hint = f"no run in '{runs}' has a checkpoint '{name}' yet: start one with `lmlight fit`"
    elif path.is_dir():
        found = [file for folder in (path, path / FOLDER) if (file := folder / f"{prefer}.ckpt").is_file()]
        hint = f"folder '{path}' has no checkpoint '{prefer}.ckpt': pass a run's folder"
    else:
        return path
    if not found:
        raise UserError(f"{hint}, or pass a file's path")
    return found[0]


def import_classes(net: str | None, tokenizer: str | None) -> tuple[type[Net] | None, type[Tokenizer] | None]:
    """Import the classes that the user names, so that checkpoints with them can be loaded; see `import_class`."""
    return (
        import_class("--model.net", net, Net) if net else None,
        import_class("--data.tokenizer", tokenizer, Tokenizer) if tokenizer else None,
    )


def tokenizer_of(checkpoint: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None if the data of its run had none."""
    data: Tensor | None = checkpoint[METADATA_KEY]["tokenizer"]
    return None if data is None else deserialize(data.numpy().tobytes())


def text_model_of(checkpoint: dict[str, Any], trusted: type[Net] | None = None) -> tuple[Net, Tokenizer]:
    """The network, in evaluation mode, and the tokenizer.

    Raises:
        UserError: See `net_class`; there is no tokenizer, or its class has not been imported.
    """
    net, tokenizer = net_of(checkpoint, trusted), tokenizer_of(checkpoint)
    if tokenizer is None:
        raise UserError("this checkpoint has no tokenizer, as its run's data had none: it can generate token ids only")
    return net.eval(), tokenizer


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The network's state dict."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(NET_PREFIX): value for name, value in state.items() if name.startswith(NET_PREFIX)}


def net_class(checkpoint: dict[str, Any], trusted: type[Net] | None = None) -> type[Net]:
    """The class of a checkpoint's network, which must have been imported: a name in a file never imports code.

    Args:
        checkpoint: From `read`.
        trusted: The class, if the user has named it. None looks it up among the imported classes.

    Raises:
        UserError: The class has not been imported, or `trusted` is a different class.
    """
    name: str = checkpoint[METADATA_KEY]["net"]["class"]
    trusted = trusted or subclasses(Net).get(name)
    if trusted is None:
        raise UserError(
            f"the checkpoint's network is a {name}, whose module is not imported, because that would run its code: if you "
            f"trust it, pass --model.net {name}, or net={name.rpartition('.')[2]} in Python"
        )
    if not f".{name}".endswith(f".{trusted.__qualname__}"):
        raise UserError(
            f"the checkpoint's network is a {name}, not a {trusted.__qualname__}: pass --model.net {name}; a class that has "
            "been renamed needs its old name"
        )
    return trusted


def net_of(checkpoint: dict[str, Any], trusted: type[Net] | None = None) -> Net:
    """The network of a checkpoint, with its weights; see `net_class`."""
    net = untrained_net_of(checkpoint, trusted)
    load_weights(net, checkpoint)
    return net


def untrained_net_of(checkpoint: dict[str, Any], trusted: type[Net] | None = None) -> Net:
    """A network of the checkpoint's class and size, with initial weights; see `net_class`."""
    kind = net_class(checkpoint, trusted)
    try:
        return kind(**checkpoint[METADATA_KEY]["net"]["config"])
    except TypeError as error:  # an argument has been removed, renamed or added
        raise changed(kind, error) from error


def load_weights(net: Net, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint's weights into a network.

    Raises:
        UserError: the network has different weights.
    """
    try:
        net.load_state_dict(weights_of(checkpoint))
    except RuntimeError as error:
        raise changed(type(net), error) from error


def changed(kind: type[Net], error: Exception) -> UserError:
    """The error for a checkpoint that no longer fits the code of its network."""
    problem = re.sub("^Error.* for .*?: ", "", " ".join(str(error).split()))  # without torch's prefix
    return UserError(
        f"the class {kind.__name__} has changed since this checkpoint was written ({problem}): restore the class as it was"
    )


def check_compatible(checkpoint: dict[str, Any], net: Net) -> None:
    """Check that the checkpoint's network has the same class and arguments as `net`. `dropout` may differ.

    Raises:
        UserError: The class or an argument differs.
    """
    metadata = checkpoint[METADATA_KEY]["net"]
    # without the module's name, which for a script is `__main__` when run, and its own when imported
    here = {"class": net.class_name.rpartition(".")[2], **net.config}
    there = {"class": metadata["class"].rpartition(".")[2], **metadata["config"]}
    here, there = json.loads(json.dumps([here, there]))  # the command line turns tuples into lists
    differing = {k for k in here.keys() | there.keys() if here.get(k) != there.get(k)} - {"dropout"}
    if differing:
        what = ", ".join(f"{k} {there.get(k)} in the checkpoint, {here.get(k)} here" for k in sorted(differing))
        raise UserError(f"this checkpoint is from a different network ({what}): drop the flags that differ")


def _is_intact(file: Path | IO[bytes]) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            # torch writes no attributes; if a member is marked as a directory, its tensor stays uninitialized
            return not any(member.external_attr for member in archive.infolist()) and archive.testzip() is None
    except Exception:  # damage can surface as almost any exception: BadZipFile, zlib.error, EOFError, OSError, ...
        return False


def _damaged(path: Path) -> UserError:
    """The error for a damaged file. Names the newest intact one in this run or, if there is none, in others."""
    run = path.absolute().parent.parent
    others = _newest_first(path.parent.glob("*.ckpt")) + _newest_first(run.parent.glob(f"*/{FOLDER}/*.ckpt"))
    intact = next((other for other in others if other != path and _is_intact(other)), None)
    remedy = (
        f"the newest intact one is '{intact}'" if intact else "no intact checkpoint was found in this or a sibling run"
    )
    return UserError(f"'{path}' is not a checkpoint, or is truncated or damaged: {remedy}")


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
