"""The file that is a whole model: written so that it is never half there, and read with care.

- A checkpoint of Lightning's carries one more entry, `lmlight`: the net's class and arguments, the tokenizer's own
  bytes, and the settings of the run. With the weights that is all there is to know about a model.
- A kill or a full disk at any moment leaves the file of before (`files.whole`).
- The end of the file is a *seal*, the SHA-256 of all before it, inside the zip archive's comment, where torch does not mind
  it: torch itself does not notice a flipped bit.
- Reading checks the seal and uses `weights_only=True`, which refuses a pickle that would run code.

Free of lightning.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

import torch
from torch import Tensor

import lmlight
from lmlight import files
from lmlight.data.tokenizer import Tokenizer, from_bytes
from lmlight.errors import UserError
from lmlight.models import NETS, Net

METADATA_KEY = "lmlight"
LAYOUT = 2  # raised when a file of the older kind can no longer be read as it is
FOLDER = "checkpoints"  # of a run's folder
NET_PREFIX = "net."  # the net's part of the LightningModule's state_dict
SEAL = b"lmlight sha256 "  # followed by 64 hexadecimal digits


def model_metadata(
    net: Net,
    tokenizer: Tokenizer,
    sampling: Mapping[str, Any] = MappingProxyType({}),
    settings: Mapping[str, Any] = MappingProxyType({}),
    optimizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What makes a checkpoint whole: the value of its entry `lmlight`.

    Args:
        net: its class must be one of `models.NETS`, or made from one (FSDP does that).
        tokenizer: kept as its own bytes.
        sampling: the arguments of the model's `Sampling`.
        settings: plain values (text, numbers, lists, dicts) that the command line reads back as defaults.
        optimizer: the class whose state the checkpoint holds, and its hyperparameters.

    Returns:
        the entry; where these weights have been validated, `LanguageModel` adds the `metrics`.

    Raises:
        UserError: see `name_of`.
    """
    return {
        "lmlight_version": lmlight.__version__,
        "layout": LAYOUT,
        "net": {"class": name_of(net), "config": net.config},
        "tokenizer": torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8),
        "sampling": dict(sampling),
        "settings": dict(settings),
        "optimizer": optimizer,
    }


def name_of(net: Net) -> str:
    """The key of `models.NETS` that makes such a net.

    Raises:
        UserError: none does. (An exception of its own: Lightning takes a `StopIteration` in a hook for the end of the data.)
    """
    for name, kind in NETS.items():
        if isinstance(net, kind):
            return name
    raise UserError(
        f"a checkpoint cannot hold a {type(net).__name__}: expected one of lmlight's networks ({', '.join(NETS)}); to train "
        "a custom one, use the Python API with Trainer(enable_checkpointing=False)"
    )


def write(content: dict[str, Any], path: str | Path) -> None:
    """Publishes a checkpoint: whole, or not at all.

    Args:
        content: tensors and plain values.
        path: replaced if it is there.

    Raises:
        UserError: the disk is full, or the folder is not to be written; the file of before is as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as beside, beside.open("w+b") as file:
            torch.save(content, file)
            _seal(file)
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when the disk is full
        reason = (isinstance(error, OSError) and error.strerror) or "not all of it arrived: the disk may be full"
        kept = "the one before it is as it was" if path.exists() else "nothing was left"
        raise UserError(f"checkpoint '{path}' cannot be written ({reason}): free some space; {kept}") from None


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU.

    Raises:
        UserError: no such file; damaged; not one of lmlight's, or of another layout; a pickle that would run code.
    """
    return check(load(path), path)


def load(path: str | Path) -> dict[str, Any]:
    """The tensors and plain values in a file of torch's, on the CPU.

    Raises:
        UserError: no such file; damaged; not a file of torch's; a pickle that would run code.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            if not _is_intact(file):
                newest = next((good for good in _around(path) if good != path and is_intact(good)), None)
                instead = f"the newest good one is '{newest}'" if newest else "no good one lies near it"
                raise UserError(f"'{path}' is not a checkpoint, or truncated or damaged: {instead}")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"no checkpoint at '{path}': pass the path of a .ckpt file, as `lmlight fit` prints it"
        ) from None
    except OSError as error:
        raise UserError(
            f"checkpoint '{path}' cannot be read ({error.strerror}): pass the path of a .ckpt file"
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint '{path}' is refused: it holds more than tensors and plain values, and loading it could run code; "
            "pass one that lmlight wrote"
        ) from None
    except RuntimeError:  # an intact zip archive that is not torch's
        content = None
    if not isinstance(content, dict):
        raise _not_ours(path)
    return content


def _not_ours(path: str | Path) -> UserError:
    return UserError(f"'{path}' is not a checkpoint of lmlight's: pass one that `lmlight fit` wrote")


def check(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """What `load` gave, if it is a checkpoint that this version can read.

    Raises:
        UserError: it is not one of lmlight's, or of another layout.
    """
    if METADATA_KEY not in content:
        raise _not_ours(path)
    described = content[METADATA_KEY]
    if described.get("layout") != LAYOUT:
        raise UserError(
            f"checkpoint '{path}' was written by lmlight {described.get('lmlight_version')} in layout "
            f"{described.get('layout')}, and this is lmlight {lmlight.__version__}, which reads layout {LAYOUT}: "
            "install the version that wrote it"
        )
    return content


def find(name: str | Path, runs: str | Path, prefer: Literal["best", "last"]) -> Path:
    """The file that a user means by a checkpoint.

    Args:
        name: a file; a run's folder, or its folder of checkpoints; or `best` or `last`, of the newest run that has one.
        runs: the folder of all runs.
        prefer: which one of a folder's.

    Raises:
        UserError: there is none.
    """
    if str(name) in ("best", "last"):
        found = _by_age(Path(runs).glob(f"*/{FOLDER}/{name}.ckpt"))
        if not found:
            raise UserError(
                f"no run in '{runs}' has a checkpoint '{name}' yet: start one with `lmlight fit`, or pass a file's path"
            )
        return found[0]
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [folder / f"{prefer}.ckpt" for folder in (path, path / FOLDER)]
        found = [file for file in inside if file.is_file()]
        if not found:
            raise UserError(f"folder '{path}' has no checkpoint '{prefer}.ckpt': pass a run's folder, or a file's path")
        return found[0]
    return path


def make_run_dir(runs: Path) -> Path:
    """Makes the folder of a run, named after the time, which no other run has: only one of two processes can make it.

    Raises:
        UserError: it cannot be made.
    """
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = runs / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(
            f"the run's folder cannot be made in '{runs}' ({error.strerror}): pass another, "
            "--trainer.default_root_dir FOLDER"
        ) from None
    raise AssertionError("numbers do not end")


def tokenizer_of(checkpoint: dict[str, Any]) -> Tokenizer:
    """The tokenizer inside a checkpoint that `read` gave."""
    data: Tensor = checkpoint[METADATA_KEY]["tokenizer"]
    return from_bytes(data.numpy().tobytes())


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The net's weights inside a checkpoint that `read` gave, by their names in the net."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(NET_PREFIX): value for name, value in state.items() if name.startswith(NET_PREFIX)}


def net_of(checkpoint: dict[str, Any]) -> Net:
    """The net inside a checkpoint that `read` gave, with its weights."""
    net = untrained_net_of(checkpoint)
    net.load_state_dict(weights_of(checkpoint))
    return net


def untrained_net_of(checkpoint: dict[str, Any]) -> Net:
    """A net like the one inside a checkpoint that `read` gave, with weights of its own."""
    described = checkpoint[METADATA_KEY]["net"]
    return NETS[described["class"]](**described["config"])


def check_compatible(checkpoint: dict[str, Any], net: Net) -> None:
    """Whether `net` can take the checkpoint's weights; its dropout may differ.

    Raises:
        UserError: another class or size.
    """
    described = checkpoint[METADATA_KEY]["net"]
    ours, theirs = {"class": name_of(net), **net.config}, {"class": described["class"], **described["config"]}
    differing = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} - {"dropout"}
    if differing:
        what = ", ".join(f"{k} {theirs.get(k)} in the checkpoint, {ours.get(k)} here" for k in sorted(differing))
        raise UserError(f"this checkpoint is of another net ({what}): drop the flags that differ")


def is_intact(path: Path) -> bool:
    """Whether a checkpoint file is there, whole, and as it was written."""
    try:
        with path.open("rb") as file:
            return _is_intact(file)
    except OSError:
        return False


def _seal(file: IO[bytes]) -> None:
    """Ends a zip archive with a comment that holds the SHA-256 of everything before it."""
    file.seek(-2, os.SEEK_END)  # the length of the comment: the last field of an archive without one
    file.write(struct.pack("<H", len(SEAL) + 64))
    digest = _sha256(file, file.tell())
    file.write(SEAL + digest.encode())


def _is_intact(file: IO[bytes]) -> bool:
    size = file.seek(0, os.SEEK_END)
    sealed = size - len(SEAL) - 64
    if sealed > 0:
        file.seek(sealed)
        seal = file.read()
        if seal.startswith(SEAL):
            return _sha256(file, sealed) == seal.removeprefix(SEAL).decode(errors="replace")
    try:  # not written here, by `Trainer.save_checkpoint` from Python say: zip's own check sums
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            return not archive.comment and archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError):
        return False


def _sha256(file: IO[bytes], length: int) -> str:
    """Of the first `length` bytes; leaves the file's position there."""
    digest = hashlib.sha256()
    file.seek(0)
    while length:
        chunk = file.read(min(length, 2**20))
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()


def _around(path: Path) -> list[Path]:
    """Checkpoints beside `path`, then those of the runs beside its run, the newest first."""
    runs = path.absolute().parents[2] if len(path.absolute().parents) > 2 else path.parent
    return _by_age(path.parent.glob("*.ckpt")) + _by_age(runs.glob(f"*/{FOLDER}/*.ckpt"))


def _by_age(paths: Any) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
