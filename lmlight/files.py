"""A file or a folder that appears whole, or not at all.

It is written beside its place, under a hidden name, flushed to the disk, and renamed: a kill or a full disk at any moment
leaves what was there before. (For a folder that is replaced there is an exception: see `whole_folder`.)
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path, shared: bool = False) -> Iterator[Path]:
    """Where to write what becomes the file `path` once the block ends without an exception.

    Args:
        path: replaced if it is there, unless it is shared; its folder is.
        shared: several processes may write it at a time, and the first wins. Each has a file of its own beside it, which a
            kill leaves behind; else there is one name, and the next writing takes what a kill has left.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}" if shared else f".{path.name}.part")
    try:
        yield beside
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        if shared:
            with suppress(OSError):  # another process was first, or this disk has no links
                os.link(beside, path)
        if not (shared and path.exists()):
            beside.replace(path)
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path`, in place of what is there, once the block ends without an exception.

    The old folder is renamed to `.NAME.before`, the new one to `path`, and the old one is deleted. A kill between the two
    renames leaves the old one, complete, under its hidden name until the next call.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    beside, before = (path.with_name(f".{path.name}.{name}") for name in ("part", "before"))
    try:
        shutil.rmtree(beside, ignore_errors=True)  # what a kill has left
        beside.mkdir()
        yield beside
        for parent, _, names in os.walk(beside, topdown=False):
            for name in names:
                with Path(parent, name).open("r+b") as file:
                    os.fsync(file.fileno())
            _flush_folder(Path(parent))
        if path.exists():
            shutil.rmtree(before, ignore_errors=True)
            path.rename(before)
        beside.rename(path)
        _flush_folder(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a loss of power; Windows has no such call, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
