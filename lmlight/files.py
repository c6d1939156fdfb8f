"""A file that appears whole, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path, shared: bool = False) -> Iterator[Path]:
    """Where to write what becomes `path`, on the disk, once the block ends without an exception.

    It is a hidden file beside `path`, which is flushed and then renamed: a kill or a full disk at any moment leaves what was
    there before.

    Args:
        path: replaced if it is there; its folder is.
        shared: several processes may write it at a time, all of them the same. Each has a file of its own beside it, which
            a kill leaves behind; else there is one name, and the next writing takes what a kill has left.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}" if shared else f".{path.name}.part")
    try:
        yield beside
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        try:
            beside.replace(path)
        except PermissionError:  # Windows, while another process reads what it has put there
            if not (shared and path.exists()):
                raise
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a loss of power; Windows has no such call, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
