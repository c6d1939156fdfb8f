"""A corpus: a built-in one, a file, a folder, a pattern or an address.

- Its files are found, downloaded (`download`), hashed, and read in chunks (`reading`).
- It is split by characters, before any tokenizer sees it.

Free of torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from lmlight.data.cache import cache_dir
from lmlight.data.download import BUILTIN_CORPORA, STORE_MARK, download, fetch
from lmlight.data.reading import (
    CHUNK_SIZE,
    RECORD_SUFFIXES,
    SUPPORTED_FILES,
    TextChunk,
    TextFormat,
    file_format,
    is_text_file,
    read_error,
    read_file,
    slice_chunks,
    split_between_lines,
)
from lmlight.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """A text that can be read repeatedly without being held in memory.

    Attributes:
        source: the name, path, pattern or address that the user passed, for messages.
        files: the files with its text, in order.
        text_format: how they are read.
        fingerprint: the SHA-256 of everything that the text depends on; part of the names of caches.
        has_documents: whether it consists of documents.
    """

    source: str
    files: tuple[Path, ...]
    text_format: TextFormat
    fingerprint: str
    has_documents: bool

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[TextChunk]:
        """The characters `[start:stop]`, in chunks of about a megabyte.

        Chunks end where tokenizers split text too, so tokenizing them one by one gives the tokens of the whole.

        Raises:
            UserError: a file cannot be read, is binary or in another encoding, or lacks the field.
        """
        return split_between_lines(slice_chunks(self._read(), start, stop))

    @cached_property
    def n_chars(self) -> int:
        """The number of characters. The first access reads the whole corpus.

        Raises:
            UserError: see `chunks`; or there is no text.
        """
        chars = sum(len(chunk.text) for chunk in self._read())
        if not chars:
            raise UserError(f"corpus '{self.source}' is empty: pass a text of at least 1,000 characters")
        return chars

    @property
    def text(self) -> str:
        """The whole text in memory, with nothing between documents."""
        return "".join(chunk.text for chunk in self._read())

    def _read(self) -> Iterator[TextChunk]:
        """The chunks of all files, without documents that are empty."""
        in_document = False
        for path in self.files:
            for text, ends_document in read_file(path, self.text_format, self.has_documents, self.source):
                in_document = in_document or bool(text)
                if in_document and (text or ends_document):
                    yield TextChunk(text, ends_document)
                in_document = in_document and not ends_document


def load(source: str, text_format: TextFormat = TextFormat(), cache: str | None = None) -> Corpus:
    """Finds, downloads and hashes a corpus. Its text is read later.

    Args:
        source: a key of `BUILTIN_CORPORA`, a file, a folder, a pattern, or an address.
        text_format: how to read its files.
        cache: the cache folder; None is the default one.

    Raises:
        UserError: there is no such corpus, or it cannot be read or downloaded.
    """
    files = _find(source, cache)
    try:
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            hashes = list(pool.map(_sha256, files))
    except OSError as error:
        raise read_error(source, error) from None
    formats = [file_format(path.name) for path in files]
    has_records = any(suffix in RECORD_SUFFIXES for suffix, _ in formats)
    has_documents = has_records or len(files) > 1 or text_format.separator is not None
    depends_on = [formats, hashes, list(vars(text_format).values())]
    fingerprint = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    return Corpus(source, tuple(files), text_format, fingerprint, has_documents)


def find_store(source: str, cache: str | None = None) -> Path | None:
    """The folder of the token store that `source` names, copied to the cache from an address; None if it names text.

    Raises:
        UserError: it cannot be downloaded.
    """
    if source in BUILTIN_CORPORA:
        return None
    if "://" not in source:
        folder = Path(source).expanduser()
    elif is_text_file(urlsplit(source).path) or glob.has_magic(source):
        return None
    else:
        folder = download(source, cache_dir(cache) / "downloads")[0].parent
    return folder if (folder / STORE_MARK).is_file() else None


def train_chars(chars: int, val_fraction: float) -> int:
    """The number of characters for training, at the beginning of the text; for 0.1 nanoGPT's `int(0.9 * n)`."""
    return int((1 - val_fraction) * chars)


def split(text: str, val_fraction: float) -> tuple[str, str]:
    """Splits a text into a training part and, at the end, a validation part."""
    cut = train_chars(len(text), val_fraction)
    return text[:cut], text[cut:]


def _find(source: str, cache: str | None) -> list[Path]:
    """The files of a corpus, in the same order on every platform."""
    if source in BUILTIN_CORPORA:
        return [fetch(source, cache)]
    if "://" in source:
        return download(source, cache_dir(cache) / "downloads")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if is_text_file(file.name) and file.is_file()]
            visible = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
            if visible:
                return sorted(visible, key=Path.as_posix)
            raise UserError(
                f"corpus '{source}' is a folder without text: expected files named {SUPPORTED_FILES}; for others pass a "
                f"pattern, such as '{path / '**' / '*.py'}'"
            )
        if path.exists():
            return [path]
        if glob.has_magic(source):
            matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  (pathlib has no absolute patterns)
            if found := [file for match in matches if (file := Path(match)).is_file()]:
                return sorted(found, key=Path.as_posix)
            raise UserError(f"no file matches the pattern '{source}': check --data.corpus")
    except OSError as error:
        raise read_error(source, error) from None
    raise UserError(
        f"no corpus at '{source}': expected a text file, a folder, a pattern, an address, or a built-in corpus "
        f"({', '.join(BUILTIN_CORPORA)}); check --data.corpus"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK_SIZE):
            digest.update(block)
    return digest.hexdigest()
