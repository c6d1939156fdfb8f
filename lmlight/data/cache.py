"""The cache folder, for everything that can be made again.

    corpora/    built-in corpora
    downloads/  texts read from an address, one folder for each version
    tokens/     token stores, each named after everything that its ids depend on
    peers/      what the benchmarks compare with

No name depends on the source alone: an edited text gets a new name, and the old entry can be cleared.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from lmlight.errors import UserError

# Only these folders are ever listed or cleared, in case LMLIGHT_CACHE is a folder with other files in it.
KINDS = ("corpora", "downloads", "tokens", "peers")


def cache_dir(folder: str | None = None) -> Path:
    """The cache folder: `folder`, or `$LMLIGHT_CACHE`, or the platform's default (`~/.cache/lmlight` on Linux)."""
    return Path(folder or os.environ.get("LMLIGHT_CACHE") or platformdirs.user_cache_dir("lmlight")).expanduser()


def make_folder(folder: Path) -> None:
    """Creates a folder in the cache.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache folder '{folder}' cannot be created ({error.strerror}): pass another, --data.cache FOLDER, or set "
            "LMLIGHT_CACHE"
        ) from None
