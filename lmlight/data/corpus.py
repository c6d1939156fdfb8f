"""A corpus: a built-in one, a file, a folder, a glob pattern or a URL.

- Its files are found, downloaded (`download`), hashed, and read in chunks (`reading`).
- It is split into training and validation text by character count, before tokenization.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lmlight.data import reading
from lmlight.data.download import find_files
from lmlight.data.reading import TextChunk, TextFormat
from lmlight.errors import UserError


class FileState(NamedTuple):
    """A file as it was when it was hashed."""

    size: int
    mtime_ns: int
    sha256: str

    def has_changed(self, path: Path) -> bool:
        """Whether the content has changed. It is hashed again only if its size or modification time differs."""
        try:
            stat = path.stat()
            return (stat.st_size, stat.st_mtime_ns) != self[:2] and _sha256(path) != self.sha256
        except OSError:
            return True


@dataclass(frozen=True)
class Corpus:
    """A text that can be read repeatedly without being held in memory.

    Attributes:
        source: the name, path, glob pattern or URL that the user passed, for messages.
        files: the files with its text, in order.
        text_format: how they are read.
        fingerprint: the SHA-256 of everything that the text depends on; part of its token store's cache key.
        has_documents: whether it consists of documents.
        states: the states of the files.
    """

    source: str
    files: tuple[Path, ...]
    text_format: TextFormat
    fingerprint: str
    has_documents: bool
    states: tuple[FileState, ...]

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[TextChunk]:
        """The characters `[start:stop]`, in chunks that end with a document or after about `reading.CHUNK_SIZE` characters.

        Chunks end only where `SentencePieceTokenizer` also splits text, so encoding them one by one gives the same tokens as
        encoding the whole text.

        Raises:
            UserError: a file cannot be read, is binary or in another encoding, lacks the field, or has changed.
        """
        return reading.split_between_lines(reading.slice_chunks(self._read(), start, stop))

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
        for path, state in zip(self.files, self.states):
            for text, ends_document in reading.read_file(path, self.text_format, self.has_documents, self.source):
                in_document = in_document or bool(text)
                if in_document and (text or ends_document):
                    yield TextChunk(text, ends_document)
                in_document = in_document and not ends_document
            if state.has_changed(path):
                raise UserError(f"corpus '{self.source}' changed while it was being read ({path.name}): try again")


def load(source: str, text_format: TextFormat = TextFormat(), cache: str | None = None) -> Corpus:
    """Finds, downloads and hashes a corpus. Its text is read later.

    Args:
        source: a key of `BUILTIN_CORPORA`, a file, a folder, a glob pattern, or a URL.
        text_format: how to read its files.
        cache: the cache folder; None is the default one.

    Raises:
        UserError: there is no such corpus, or it cannot be read or downloaded.
    """
    return open_files(source, find_files(source, cache), text_format)


def open_files(source: str, files: list[Path], text_format: TextFormat = TextFormat()) -> Corpus:
    """The corpus in `files`, see `load`."""
    try:
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            states = tuple(pool.map(_state, files))
    except OSError as error:
        name = f"{source}: {Path(error.filename).name}" if error.filename and len(files) > 1 else source
        raise reading.read_error(name, error) from None
    formats = [reading.file_format(path.name) for path in files]
    has_records = any(suffix in reading.RECORD_SUFFIXES for suffix, _ in formats)
    has_documents = has_records or len(files) > 1 or text_format.separator is not None
    fingerprint = hashlib.sha256(
        json.dumps([formats, [state.sha256 for state in states], astuple(text_format)]).encode()
    ).hexdigest()
    return Corpus(source, tuple(files), text_format, fingerprint, has_documents, states)


def train_chars(chars: int, val_fraction: float) -> int:
    """The number of characters for training, at the start of the text; for 0.1, nanoGPT's `int(0.9 * n)`."""
    return int((1 - val_fraction) * chars)


def split(text: str, val_fraction: float) -> tuple[str, str]:
    """Splits a text into a training split and, at its end, a validation split."""
    cut = train_chars(len(text), val_fraction)
    return text[:cut], text[cut:]


def _state(path: Path) -> FileState:
    stat = path.stat()  # before it is read
    return FileState(stat.st_size, stat.st_mtime_ns, _sha256(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(reading.CHUNK_SIZE):
            digest.update(block)
    return digest.hexdigest()
