"""A file or a folder that appears whole, or not at all.

It is written beside its place, under a hidden name, flushed to the disk, and renamed: a kill or a full disk at any moment
leaves what was there before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Of the calls that exchange two paths: renameat2 in Linux's <linux/fs.h>, renamex_np in macOS's <sys/stdio.h>.
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2


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

    On Linux and macOS the two are exchanged in one step, so the old or the new folder is always at `path`. Windows, and some
    network file systems, have no such call: there a kill between two renames leaves the old folder beside `path`, and the
    next writing puts it back first.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    beside, before = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.before")
    try:
        if before.exists() and not path.exists():
            before.rename(path)
        for left in (beside, before):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir()
        yield beside
        for folder, _, names in os.walk(beside):
            for name in names:
                with (Path(folder) / name).open("r+b") as file:
                    os.fsync(file.fileno())
            _flush_folder(Path(folder))
        if not path.exists():
            beside.rename(path)
        elif not _exchange(beside, path):
            path.rename(before)
            try:
                beside.rename(path)
            except OSError:
                before.rename(path)
                raise
        _flush_folder(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where the system or the file system cannot."""
    if os.name != "posix":
        return False
    libc, paths = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        status = libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        status = libc.renamex_np(*paths, RENAME_SWAP)
    else:
        return False
    if status and (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(number, os.strerror(number), str(other))
    return not status


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a loss of power; Windows has no such call, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
