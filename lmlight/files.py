"""Files and folders that appear complete, or not at all.

They are written under a hidden name in the same folder, flushed to the disk, and renamed, so a kill or a full disk at any
moment leaves the previous version intact. (Replacing a folder is not quite atomic, see `whole_folder`.)
"""

import errno
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "darwin":
    import fcntl


def shown(path: str | os.PathLike[str]) -> str:
    """A path to print: relative to the current folder, or absolute if it is on another Windows drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


@contextmanager
def whole(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path, whose file replaces `path` when the block ends without an exception.

    Args:
        path: a file in an existing folder; replaced unless it is shared.
        shared: several processes may write it at the same time, and the first one wins. Temporary names are then unique, so
            the file of a killed process stays behind; otherwise the next call overwrites it.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}" if shared else f".{path.name}.part")
    try:
        yield beside
        _flush(beside)
        if shared:
            with suppress(OSError):  # another process was first, or the file system has no hard links
                os.link(beside, path)
        if not (shared and path.exists()):
            _move(beside, path)
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which replaces `path` when the block ends without an exception.

    The old folder is renamed to `.NAME.before`, the new one to `path`, and the old one is deleted. A kill between the two
    renames leaves the old one, complete, under its hidden name until the next call.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    beside, before = (path.with_name(f".{path.name}.{name}") for name in ("part", "before"))
    try:
        shutil.rmtree(beside, ignore_errors=True)  # left by a kill
        beside.mkdir()
        yield beside
        for parent, _, names in os.walk(beside, topdown=False):
            for name in names:
                _flush(Path(parent, name))
            _flush_folder(Path(parent))
        if path.exists():
            shutil.rmtree(before, ignore_errors=True)
            _move(path, before)
        try:
            _move(beside, path)
        except OSError:
            if before.exists():
                _move(before, path)
            raise
        _flush_folder(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    for seconds in (0.01, 0.1, 1.0):
        try:
            source.replace(target)
            return
        except PermissionError:  # on Windows, while another process, such as a virus scanner, has one of them open
            time.sleep(seconds)
    source.replace(target)


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        if sys.platform == "darwin":  # where fsync leaves the data in the drive's cache
            with suppress(OSError):  # not every file system can
                fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power loss. Windows and some network drives do not support this."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # the same exceptions as in PostgreSQL's `fsync_fname`
            if error.errno not in (errno.EBADF, errno.EINVAL):
                raise
        finally:
            os.close(descriptor)
