"""A file or a folder that a user names: it appears whole or not at all, and never over another without leave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lmlight import files
from lmlight.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path, force: bool) -> Iterator[Path]:
    """Where to write what becomes the file `path` once the block ends without an exception.

    Raises:
        UserError: it is there and `force` is not given; it is a folder; it cannot be written.
    """
    path = path.expanduser().resolve()
    if path.is_dir():
        raise UserError(f"'{path}' is a folder: pass the path of a file")
    if path.exists() and not force:
        raise UserError(f"'{path}' is there already: pass another path, or --force to replace it")
    with _writing(path), files.whole(path) as beside:
        yield beside


@contextlib.contextmanager
def whole_folder(path: Path, force: bool, ours: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to fill that becomes the folder `path` once the block ends without an exception.

    Args:
        path: replaced if it is empty.
        force: replace it also if it has files, but only such as are ours, for a folder is easily mistyped.
        ours: whether an export writes a file of this name.

    Raises:
        UserError: it is there and may not be replaced; it cannot be written.
    """
    path = path.expanduser().resolve()
    files.restore(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"'{path}' is a file: pass the path of a folder that is not there yet")
    inside = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if inside and not force:
        raise UserError(f"folder '{path}' is not empty: pass another, or --force to replace it")
    if foreign := [name for name in inside if not ours(name)]:
        raise UserError(f"folder '{path}' holds '{foreign[0]}', which no export wrote: pass another folder")
    with _writing(path), files.whole_folder(path) as beside:
        yield beside


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes the folder that `path` lies in, and one line of what goes wrong while it is written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"'{path}' cannot be written ({reason}): pass another path, or free some space") from None
