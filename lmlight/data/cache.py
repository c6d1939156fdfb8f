"""The cache folder, for everything that can be made again.

    corpora/    named corpora, downloaded once
    downloads/  texts read from an address, one folder for each version
    tokens/     token stores, each named after everything that its ids depend on
    peers/      what the benchmarks compare with

No name depends on the source alone: an edited text gets a new name, and the old entry can be cleared.
"""

from __future__ import annotations

import os
from pathlib import Path

import pooch

from lmlight.errors import UserError

# The only folders that are ever listed or cleared: whoever points LMLIGHT_CACHE at their home loses nothing else.
KINDS = ("corpora", "downloads", "tokens", "peers")


def cache_dir(flag: str | None = None) -> Path:
    """Where the cache is: `flag`, or `$LMLIGHT_CACHE`, or the platform's own place (`~/.cache/lmlight` on Linux)."""
    return Path(flag or os.environ.get("LMLIGHT_CACHE") or pooch.os_cache("lmlight")).expanduser()


def make_folder(folder: Path) -> None:
    """Makes a folder of the cache.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache folder '{folder}' cannot be made ({error.strerror}): pass another, --data.cache FOLDER, or set "
            "LMLIGHT_CACHE"
        ) from None
