"""A file or a folder that appears whole, or not at all.

It is written beside its place, under a hidden name, flushed to the disk, and renamed: a kill or a full disk at any moment
leaves what was there before. (For folders on some systems there is an exception: see `whole_folder`.)
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
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
            _appear(beside, path)
        else:
            beside.replace(path)
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _appear(beside: Path, path: Path) -> None:
    """Puts a file in its place unless one is there, which a link does in one step."""
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError:  # no links on this disk
        if not path.exists():
            beside.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path`, in place of what is there, once the block ends without an exception.

    The new folder is flushed to the disk and then exchanged with the old one in one step, so that a kill at any moment
    leaves one of the two at `path`, complete. Windows and some file systems cannot exchange folders. There the old one is
    renamed to `.NAME.before` and the new one to `path`; after a kill between the two renames, nothing is at `path` until
    the next call, or `restore`, puts the old one back.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    restore(path)
    beside = path.with_name(f".{path.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # what a kill has left
        beside.mkdir()
        yield beside
        _flush_tree(beside)
        if not path.exists():
            beside.rename(path)
        elif not _exchange(beside, path):
            try:
                path.rename(_before(path))
                beside.rename(path)
            finally:
                restore(path)
        _flush_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def restore(path: Path) -> None:
    """Puts the old folder back at `path` if `whole_folder` was killed between its two renames."""
    before = _before(path)
    if before.exists() and not path.exists():
        before.rename(path)
    shutil.rmtree(before, ignore_errors=True)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step; returns False if the system or the file system has no such operation."""
    first, second = os.fsencode(one), os.fsencode(other)
    at_fdcwd, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
    name, arguments = {
        "linux": ("renameat2", (at_fdcwd, first, at_fdcwd, second, swap)),
        "darwin": ("renamex_np", (first, second, swap)),
    }.get(sys.platform, ("", ()))
    call = getattr(ctypes.CDLL(None), name, None) if name else None
    if call is None:
        return False
    return bool(call(*arguments) == 0)  # after any error, two renames may still work; if not, they raise it


def _flush_tree(folder: Path) -> None:
    """Flushes every file in a folder, and every folder after what is in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with Path(parent, name).open("r+b") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(parent))


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a loss of power; Windows has no such call, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
