"""`lmlight cache` lists or clears the cache folder (`lmlight.data.cache`)."""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lmlight.command_line import Parser
from lmlight.data.cache import KINDS, cache_dir
from lmlight.errors import UserError, reason


def main(args: Sequence[str]) -> None:
    """Runs `lmlight cache`."""
    parser = Parser(
        "lmlight cache",
        description="Lists or clears cached texts, tokens and web libraries, all of which can be recreated.",
    )
    parser.add_argument("--clear", nargs="*", metavar="NAME", help="delete these entries; without names, all of them")
    parser.add_argument("--cache", metavar="FOLDER", help="the cache; default: $LMLIGHT_CACHE or the platform's folder")
    options = parser.parse_args(args)
    folder = cache_dir(options.cache)
    found = entries(folder)
    if options.clear is None:
        for name, size in found.items():
            day = time.strftime("%Y-%m-%d", time.localtime((folder / name).lstat().st_mtime))
            print(f"{_megabytes(size)}  {day}  {name:<32} {_about(folder / name)}".rstrip())
        print(f"{_megabytes(sum(found.values()))}  total in {folder}")
        return
    if missing := [name for name in options.clear if name not in found]:
        raise UserError(f"there is no cache entry '{missing[0]}': run `lmlight cache` for a list")
    chosen = list(dict.fromkeys(options.clear or found))
    for name in chosen:
        path = folder / name
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            raise UserError(f"'{path}' cannot be deleted ({reason(error)}): check its permissions") from None
    print(f"Deleted {len(chosen)} of {len(found)} entries in {folder}")


def entries(folder: Path) -> dict[str, int]:
    """The size in bytes of each entry of a cache, the largest first."""
    found = {}
    for path in [path for kind in KINDS for path in folder.glob(f"{kind}/*")]:
        with suppress(FileNotFoundError):  # another process has just published or cleared it
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            found[f"{path.parent.name}/{path.name}"] = sum(file.stat().st_size for file in files)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _about(path: Path) -> str:
    if path.parent.name != "tokens":
        return ""
    try:
        about = json.loads((path / "index.json").read_text("utf-8"))["metadata"]
        return f"{about['corpus']}, vocabulary of {about['vocab_size']:,}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished, damaged, or from an older version"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:>10,.1f} MB"
