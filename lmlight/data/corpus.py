"""Which text: a named corpus, a file, a folder, a pattern, or an address.

- Its files are found (`download` brings those that lie elsewhere), hashed, and read in passages (`reading`).
- It is split by characters, before any tokenizer sees it.

Free of torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from lmlight.data.cache import cache_dir
from lmlight.data.download import BUILTIN_CORPORA, download, fetch, is_store
from lmlight.data.reading import (
    PASSAGE,
    RECORD_SUFFIXES,
    TextChunk,
    TextFormat,
    cut_between_lines,
    is_text,
    kind_of,
    read_file,
    slice_passages,
    suffixes,
    unreadable,
)
from lmlight.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """A text that can be read again and again, without being held in memory.

    Attributes:
        source: the name, path, pattern or address that the user gave, for messages.
        files: where its text is, in order.
        reading: how it is read.
        sha256: of a single text file's bytes; else of the files' and of what their text depends on. Caches are keyed by it.
        has_documents: whether it falls into documents.
    """

    source: str
    files: tuple[Path, ...]
    reading: TextFormat
    sha256: str
    has_documents: bool

    def passages(self, start: int = 0, stop: int | None = None) -> Iterator[TextChunk]:
        """The characters from `start` up to `stop`, in passages of about a megabyte.

        Passages are cut behind a newline, or inside a line that is longer than `MAX_LINE` where `stretches` cuts it too, so
        that tokenizing them one by one is tokenizing the whole.

        Raises:
            UserError: a file cannot be read; is binary or in another encoding; has no such field.
        """
        return cut_between_lines(slice_passages(self._read(), start, stop))

    @cached_property
    def size(self) -> tuple[int, int]:
        """Its characters, and their bytes in UTF-8. Reads all of it, once.

        Raises:
            UserError: see `passages`; there is no text.
        """
        chars = utf8 = 0
        for text, _ in self._read():
            chars += len(text)
            utf8 += len(text) if text.isascii() else len(text.encode())
        if not chars:
            raise UserError(f"corpus '{self.source}' is empty: pass a text of at least some 1,000 characters")
        return chars, utf8

    @property
    def text(self) -> str:
        """All of it in memory; ends of documents do not show."""
        return "".join(passage.text for passage in self._read())

    def _read(self) -> Iterator[TextChunk]:
        """Passages as the files have them; an empty document has no end."""
        begun = False
        for path in self.files:
            for text, ends in read_file(path, self.reading, self.has_documents, self.source):
                begun = begun or bool(text)
                if begun and (text or ends):
                    yield TextChunk(text, ends)
                begun = begun and not ends


def load(source: str, reading: TextFormat = TextFormat(), cache: str | None = None) -> Corpus:
    """The corpus called `source`: a key of `BUILTIN_CORPORA`, a file, a folder, a pattern, or an address.

    Every byte is read for the hash, so that an edited text is noticed; the text itself is not yet looked at.

    Args:
        source: as the user gave it.
        reading: how its files become text.
        cache: the cache's folder, if not the usual one.

    Raises:
        UserError: nothing there, or no text in it; not readable; empty; nowhere to be fetched from.
    """
    files = _find(source, cache)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        try:
            hashes = list(pool.map(_sha256, files))
        except OSError as error:
            raise unreadable(source, error) from None
    if not any(size for _, size in hashes):
        raise UserError(f"corpus '{source}' is empty: pass a file with text in it")
    kinds = [kind_of(path) for path in files]
    records = any(kind in RECORD_SUFFIXES for kind, _ in kinds)
    has_documents = records or len(files) > 1 or reading.separator is not None
    sha256 = hashes[0][0]
    encoding = (
        [reading.encoding] if reading.encoding != "utf-8" and any(kind != ".parquet" for kind, _ in kinds) else []
    )
    if has_documents or kinds[0][1] or reading.errors != "strict" or encoding:
        depends_on = [[*kind, digest] for kind, (digest, _) in zip(kinds, hashes)]
        how = [reading.field if records else None, reading.separator, reading.errors, *encoding]
        sha256 = hashlib.sha256(json.dumps([depends_on, how]).encode()).hexdigest()
    return Corpus(source, tuple(files), reading, sha256, has_documents)


def find_store(source: str, cache: str | None = None) -> Path | None:
    """The folder of a token store, finished or not, if `source` names one; copied to the cache if it lies elsewhere.

    Raises:
        UserError: it cannot be fetched.
    """
    if source in BUILTIN_CORPORA:
        return None
    if "://" in source:
        named_as_text = is_text(urlsplit(source).path) or glob.has_magic(source)
        folder = None if named_as_text else download(source, cache_dir(cache) / "downloads")[0].parent
    else:
        folder = Path(source).expanduser()
    return folder if folder and is_store(path.name for path in folder.glob("*")) else None


def train_chars(chars: int, val_fraction: float) -> int:
    """How many characters, from the first on, are for training: nanoGPT's split, `int(0.9 * n)` with 0.1."""
    return int((1 - val_fraction) * chars)


def split(text: str, val_fraction: float) -> tuple[str, str]:
    """The first characters for training and the last `val_fraction` of them for validation."""
    cut = train_chars(len(text), val_fraction)
    return text[:cut], text[cut:]


def _find(source: str, cache: str | None) -> list[Path]:
    """The files of a source, in an order that does not depend on the platform."""
    if source in BUILTIN_CORPORA:
        return [fetch(source, cache)]
    if "://" in source:
        return download(source, cache_dir(cache) / "downloads")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            found = [
                file
                for file in path.rglob("*")
                if is_text(file.name) and file.is_file() and not _hidden(file.relative_to(path).parts)
            ]
            if not found:
                raise UserError(
                    f"corpus '{source}' is a folder without text: expected files named {suffixes()}; for others pass a "
                    f"pattern, such as '{path / '**' / '*.py'}'"
                )
            return sorted(found, key=lambda file: file.relative_to(path).as_posix())
        if not path.exists() and glob.has_magic(source):
            matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  (pathlib has no absolute patterns)
            found = [file for match in matches if (file := Path(match)).is_file()]
            if not found:
                raise UserError(f"no file matches the pattern '{source}': check --data.corpus")
            return sorted(found, key=lambda file: file.as_posix())
        if not path.exists():
            raise FileNotFoundError
    except (FileNotFoundError, NotADirectoryError):
        names = ", ".join(BUILTIN_CORPORA)
        raise UserError(
            f"no corpus at '{source}': expected the path of a text file or folder, an address, or a corpus's name "
            f"({names}); check --data.corpus"
        ) from None
    except OSError as error:
        raise unreadable(source, error) from None
    return [path]


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _sha256(path: Path) -> tuple[str, int]:
    """A file's hash and size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(PASSAGE):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
