"""The cache folder, for everything that can be downloaded or computed again.

    corpora/    built-in corpora
    downloads/  texts read from a URL, one folder for each version
    tokens/     token stores, each named after everything that its ids depend on
    web/        libraries for the page that `lmlight export web` writes
    peers/      other projects that the benchmarks compare lmlight with

In `downloads` and `tokens`, an edited text gets a new name, and its old entry can be cleared.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from lmlight.errors import UserError, reason

# Only these folders are ever listed or cleared, in case LMLIGHT_CACHE is a folder with other files in it.
KINDS = ("corpora", "downloads", "tokens", "web", "peers")


def cache_dir(folder: str | None = None) -> Path:
    """The cache folder: `folder`, or `$LMLIGHT_CACHE`, or the platform's default (`~/.cache/lmlight` on Linux)."""
    return Path(folder or os.environ.get("LMLIGHT_CACHE") or platformdirs.user_cache_dir("lmlight")).expanduser()


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Creates a folder in the cache, to be filled in the `with` block.

    Raises:
        UserError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cache folder '{folder}' cannot be written ({reason(error)}): free some space, or choose another folder with "
            "--data.cache FOLDER or LMLIGHT_CACHE"
        ) from None
