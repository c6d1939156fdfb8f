"""Reads text from plain text and `.jsonl` files, which may be compressed, and from `.parquet` files.

- Text is exact: no newline is translated and no character dropped.
- Files are UTF-8 unless an encoding is given. The error for other files suggests an encoding.
- Files are read in chunks, so a corpus may be larger than memory.
- *Documents* are the lines of a `.jsonl` file, the rows of a `.parquet` file, the parts of a text file between two
  separators, or whole text files if there are several. A single text file has no documents.
"""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any, Literal, NamedTuple

import fsspec

from lmlight.errors import UserError, check_literals, missing_extra, reason

# Bytes read, and characters yielded, at a time.
CHUNK_SIZE = 2**20

# Longer lines are split before tokenization, before a space if possible. Pieces of the models trained here never
# cross a space, so such a split changes none of their tokens, and it bounds the memory that a line needs.
MAX_LINE = 4096

TEXT_SUFFIXES, RECORD_SUFFIXES = (".txt", ".md"), (".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # fsspec's names
SUPPORTED_FILES = f".txt, .md, .jsonl (also compressed: {', '.join(COMPRESSIONS)}), .parquet"

SURROGATE = re.compile("[\ud800-\udfff]")
HEAD_SIZE = 8192  # bytes at the beginning of a file that are examined to detect binary files


class TextChunk(NamedTuple):
    """Part of the text of a corpus.

    Attributes:
        text: not empty, except to end a document whose text has been yielded before.
        ends_document: whether a document ends after it.
    """

    text: str
    ends_document: bool = False


@dataclass(frozen=True)
class TextFormat:
    """How files are read as text. The arguments are those of `TextDataModule`; `encoding` becomes the codec's name.

    Raises:
        UserError: the separator is empty, the encoding is unknown, or `errors` is not a valid choice.
    """

    field: str = "text"
    separator: str | None = None
    errors: Literal["strict", "replace"] = "strict"
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        check_literals(TextFormat, vars(self), "data.")
        if self.separator == "":
            raise UserError("data.separator must have at least one character, or be null; got an empty string")
        try:
            b"text".decode(self.encoding, "ignore")  # unlike `codecs.lookup`, rejects codecs that are not for text
            object.__setattr__(self, "encoding", codecs.lookup(self.encoding).name)
        except (LookupError, ValueError):
            raise UserError(f"data.encoding must be a text encoding, such as utf-16, got {self.encoding!r}") from None


def split_long_line(line: str) -> Iterator[str]:
    """Splits a line into parts of at most `MAX_LINE` characters, before a space if possible."""
    start = 0
    while len(line) - start > MAX_LINE:
        end = _end_of_part(line, start)
        yield line[start:end]
        start = end
    yield line[start:]


def _end_of_part(line: str, start: int) -> int:
    space = line.rfind(" ", start + 1, start + MAX_LINE + 1)
    return start + MAX_LINE if space == -1 else space


def slice_chunks(chunks: Iterable[TextChunk], start: int, stop: int | None) -> Iterator[TextChunk]:
    """The characters `[start:stop]` of a text in chunks. `ends_document` stays with a chunk's last character."""
    position = 0
    for text, ends_document in chunks:
        first, position = position, position + len(text)
        if stop is not None and first >= stop and text:
            return
        if position > start:
            part = text[max(0, start - first) : None if stop is None else stop - first]
            ends_here = ends_document and (stop is None or position <= stop)
            if part or ends_here:
                yield TextChunk(part, ends_here)


def split_between_lines(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """The same text in chunks that end with a document or, after about `CHUNK_SIZE` characters, at a newline or where
    `split_long_line` splits."""
    pending = ""
    for text, ends_document in chunks:
        pending += text
        if ends_document:
            yield TextChunk(pending, True)
            pending = ""
        elif len(pending) >= CHUNK_SIZE:
            end = pending.rfind("\n") + 1
            while not end or len(pending) - end >= CHUNK_SIZE:
                end = _end_of_part(pending, end)
            yield TextChunk(pending[:end])
            pending = pending[end:]
    if pending:
        yield TextChunk(pending)


def file_format(name: str) -> tuple[str, str]:
    """A file's suffix and its compression suffix, such as `.txt` and `.gz`; either may be empty."""
    path = PurePath(name.lower())
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return PurePath(path.name.removesuffix(compression)).suffix, compression


def is_text_file(name: str) -> bool:
    """Whether a file in a folder is read. A file that the user names is read whatever its name is."""
    suffix, compression = file_format(name)
    return suffix in TEXT_SUFFIXES + RECORD_SUFFIXES and not (suffix == ".parquet" and compression)


def read_error(source: object, error: OSError) -> UserError:
    """The error for a file or folder that the system cannot read."""
    return UserError(f"corpus '{source}' cannot be read ({reason(error)}): check the file and its permissions")


def read_file(path: Path, text_format: TextFormat, has_documents: bool, source: str) -> Iterator[TextChunk]:
    """The text of a file of the corpus `source`; with `has_documents`, a text file without a separator is one document.

    Raises:
        UserError: the file cannot be read or decompressed, is binary or in another encoding, or lacks the field.
    """
    name = source if path == Path(source).expanduser().absolute() else f"{source}: {path.name}"
    suffix, compression = file_format(path.name)
    text = _read_text(path, compression, text_format, name, by_line=suffix == ".jsonl")
    if suffix == ".parquet" and compression:
        raise UserError(f"corpus '{name}' is a compressed .parquet file, which is not supported: decompress it")
    if suffix == ".parquet":
        yield from _read_parquet(path, text_format, name)
    elif suffix == ".jsonl":
        yield from _read_jsonl(text, text_format, name)
    elif text_format.separator:
        yield from _split_documents(text, text_format.separator)
    else:
        yield from map(TextChunk, text)
        if has_documents:
            yield TextChunk("", True)


def _read_text(path: Path, compression: str, text_format: TextFormat, name: str, by_line: bool) -> Iterator[str]:
    """The lines of a file, or its chunks of `CHUNK_SIZE` characters."""
    codec, encoding = COMPRESSIONS.get(compression), text_format.encoding
    opener = fsspec.compression.compr.get(codec)
    # with zstandard in place of backports.zstd, fsspec reads an incomplete file without an error
    if opener is None or (codec == "zstd" and not isinstance(opener, type)):
        raise missing_extra(f"reading '{path}' needs a package for {codec}", "formats")
    try:
        with _opened(path, codec) as file:
            _check_head(file.read(HEAD_SIZE), encoding, name)
        with _opened(path, codec) as file:
            text = io.TextIOWrapper(file, encoding, text_format.errors, newline="\n")
            try:
                for part in text if by_line else iter(partial(text.read, CHUNK_SIZE), ""):
                    # only a few codecs, such as utf-7, decode to surrogates
                    yield part if encoding.startswith("utf-8") else _without_surrogates(part, text_format, name)
            except UnicodeDecodeError as error:
                offset = file.tell() - len(error.object) + error.start
                with _opened(path, codec) as again:
                    blocks = (again.read(min(CHUNK_SIZE, offset - at)) for at in range(0, offset, CHUNK_SIZE))
                    decoder = codecs.getincrementaldecoder(encoding)("ignore")
                    line = 1 + sum(decoder.decode(block).count("\n") for block in blocks)
                where = f"byte 0x{error.object[error.start]:02x} at offset {offset:,}, line {line:,}"
                raise UserError(
                    f"corpus '{name}' is not {encoding} ({where}): pass --data.encoding (cp1252 for most Western European "
                    "files), or --data.errors replace to read invalid bytes as U+FFFD"
                ) from None
            except UnicodeError as error:  # UTF-16 or UTF-32 without a byte order mark
                raise UserError(f"corpus '{name}' is not {encoding} ({error}): pass another --data.encoding") from None
    except UserError:
        raise
    except Exception as error:  # each decompressor raises its own
        if isinstance(error, OSError) and (error.errno or not codec):
            raise read_error(name, error) from error
        raise UserError(
            f"corpus '{name}' is not a complete {compression} file ({reason(error)}): download it again"
        ) from None


@contextmanager
def _opened(path: Path, codec: str | None) -> Iterator[IO[bytes]]:
    """A file to read, decompressed. Not every decompressor can seek."""
    with path.open("rb") as raw, fsspec.compression.compr[codec](raw, mode="rb") as file:
        yield file


def _check_head(head: bytes, encoding: str, name: str) -> None:
    if encoding == "utf-8" and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"corpus '{name}' looks like utf-16, not utf-8: pass --data.encoding utf-16")
    # Texts may have a stray NUL. UTF-16, archives and programs have many more, and may still be valid UTF-8.
    nuls = head.decode(encoding, "ignore").count("\0")
    if nuls > len(head) / 100:
        raise UserError(
            f"corpus '{name}' looks binary ({nuls:,} NUL characters in its first {len(head):,} bytes): pass a text file, "
            "and --data.encoding, such as utf-16-le, if it is not UTF-8"
        )


def _split_documents(chunks: Iterable[str], separator: str) -> Iterator[TextChunk]:
    pending = ""
    for chunk in chunks:
        *documents, pending = (pending + chunk).split(separator)
        yield from (TextChunk(document, True) for document in documents)
        safe = len(pending) - len(separator) + 1  # a separator may begin here
        if safe > 0:
            yield TextChunk(pending[:safe])
            pending = pending[safe:]
    yield TextChunk(pending, True)


def _read_jsonl(lines: Iterable[str], text_format: TextFormat, name: str) -> Iterator[TextChunk]:
    for number, line in enumerate(lines, start=1):
        where = f"line {number:,}"
        if number == 1:
            line = line.removeprefix("\ufeff")  # a byte order mark, which is not JSON
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"corpus '{name}' is not JSON Lines ({where}): expected one object per line") from None
        _check_field(record if isinstance(record, dict) else {}, text_format, name, where)
        yield from _document(record[text_format.field], text_format, name, where)


def _read_parquet(path: Path, text_format: TextFormat, name: str) -> Iterator[TextChunk]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_extra(f"reading '{path}' needs the pyarrow package", "formats") from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_field(file.schema_arrow.names, text_format, name, "its columns")
            batches = file.iter_batches(batch_size=256, columns=[text_format.field])
            before = 0
            for column in (batch.column(0) for batch in batches):
                try:
                    values = column.to_pylist()
                except UnicodeDecodeError:
                    values = [_decoded(value, text_format, name, row) for row, value in enumerate(column, before + 1)]
                for row, value in enumerate(values, before + 1):
                    yield from _document(value, text_format, name, f"row {row:,}")
                before += len(values)
    except (ArrowException, OSError) as error:
        raise UserError(f"corpus '{name}' is not readable as .parquet ({reason(error)}): download it again") from error


def _decoded(value: Any, text_format: TextFormat, name: str, row: int) -> Any:
    """A value of a .parquet file whose strings may be invalid."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        if text_format.errors == "replace":
            return error.object.decode("utf-8", "replace")
        raise UserError(
            f"corpus '{name}' is not utf-8 (byte 0x{error.object[error.start]:02x} in row {row:,}): pass --data.errors "
            "replace to read invalid bytes as U+FFFD"
        ) from None


def _check_field(fields: Iterable[str], text_format: TextFormat, name: str, where: str) -> None:
    if text_format.field not in fields:
        found = ", ".join(fields) or "no fields"
        problem = f"has no field '{text_format.field}' in {where} (found {found})"
        raise UserError(f"corpus '{name}' {problem}: pass --data.field")


def _document(value: Any, text_format: TextFormat, name: str, where: str) -> Iterator[TextChunk]:
    if value is None:
        return
    if not isinstance(value, str):
        problem = f"has a value of type {type(value).__name__} as '{text_format.field}' in {where}, expected text"
        raise UserError(f"corpus '{name}' {problem}: pass --data.field")
    yield TextChunk(_without_surrogates(value, text_format, name, f" in {where}"), True)


def _without_surrogates(text: str, text_format: TextFormat, name: str, where: str = "") -> str:
    """Replaces unpaired surrogates, which JSON and some codecs can encode, but UTF-8 cannot, or raises a `UserError`."""
    unpaired = SURROGATE.search(text)
    if unpaired and text_format.errors == "strict":
        problem = f"has an unpaired surrogate (\\u{ord(unpaired[0]):04x}){where}"
        raise UserError(f"corpus '{name}' {problem}: pass --data.errors replace to read it as U+FFFD")
    return SURROGATE.sub("\ufffd", text) if unpaired else text
