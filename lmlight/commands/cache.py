"""`lmlight cache` lists and clears the cache folder (`lmlight.data.cache`)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lmlight.command_line import Parser
from lmlight.data.cache import KINDS, cache_dir
from lmlight.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Attributes:
        path: its file or folder.
        size: in bytes.
        used: seconds since the epoch of its last change.
        about: what it is, for the list.
    """

    path: Path
    size: int
    used: float
    about: str

    @property
    def name(self) -> str:
        """As it is listed, and as `--clear` takes it."""
        return f"{self.path.parent.name}/{self.path.name}"


def entries(folder: Path) -> list[Entry]:
    """All that is in a cache, the largest first."""
    found = []
    for kind in KINDS:
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in (folder / kind).iterdir():
                files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
                with suppress(FileNotFoundError):  # another process has just published or cleared it
                    states = [file.stat() for file in files]
                    used = max((state.st_mtime for state in states), default=path.stat().st_mtime)
                    found.append(Entry(path, sum(state.st_size for state in states), used, _about(path, kind)))
    return sorted(found, key=lambda entry: (-entry.size, entry.name))


def _about(path: Path, kind: str) -> str:
    if kind != "tokens":
        return ""
    try:
        about = json.loads((path / "index.json").read_text("utf-8"))["metadata"]
        return f"{about['corpus']}, {about['vocab_size']:,} pieces"
    except FileNotFoundError:
        return "not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return "of an earlier version, or damaged"


def clear(entry: Entry) -> None:
    """Deletes one entry.

    Raises:
        UserError: it cannot be deleted.
    """
    try:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink()
    except OSError as error:
        raise UserError(f"'{entry.path}' cannot be deleted ({error.strerror}): check its permissions") from None


def main(args: Sequence[str]) -> None:
    """Runs `lmlight cache`.

    Raises:
        UserError: an unknown name; something cannot be deleted.
    """
    parser = Parser(
        "lmlight cache",
        description="Lists what lmlight keeps: fetched texts and their tokens. All of it can be made again.",
    )
    parser.add_argument("--clear", nargs="*", metavar="NAME", help="delete these entries; without names, all of them")
    parser.add_argument(
        "--cache", metavar="FOLDER", help="where it is; else $LMLIGHT_CACHE, or the platform's own place"
    )
    options = parser.parse_args(args)
    folder = cache_dir(options.cache)
    found = entries(folder)
    if options.clear is None:
        for entry in found:
            day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
            print(f"{_size(entry.size):>9}  {day}  {entry.name:<32} {entry.about}".rstrip())
        print(f"{_size(sum(entry.size for entry in found)):>9}  in all, in {folder}")
        return
    known = {entry.name: entry for entry in found}
    if missing := [name for name in options.clear if name not in known]:
        raise UserError(f"nothing in the cache is called '{missing[0]}': `lmlight cache` lists what there is")
    chosen = [known[name] for name in options.clear] if options.clear else found
    for entry in chosen:
        clear(entry)
    print(f"Deleted {len(chosen)} of {len(found)} entries, {_size(sum(e.size for e in chosen))}, in {folder}")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
