"""Files to text: what a text file, a `.jsonl` or a `.parquet` gives, in passages.

- Text is read as it is: no newline is translated, no mark dropped, so offsets and figures are exact.
- Files are UTF-8 unless an encoding is given. The error for one that is not names the encoding that it seems to have.
- It is read in passages, never as a whole, and cut between lines, so that a text may be larger than memory.
- *Documents* are the lines of `.jsonl`, the rows of `.parquet`, several files, or what a separator keeps apart. A single
  text file is one text without an end.

Free of torch.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

from lmlight.errors import UserError

# Bytes read, and characters handed on, at a time.
PASSAGE = 2**20

# A line longer than this is tokenized in stretches, cut before a space where there is one. Pieces of a vocabulary do not
# cross a space, so a cut there changes nothing; and no line, however long, needs more memory than this.
MAX_LINE = 4096

TEXT_SUFFIXES, RECORD_SUFFIXES = (".txt", ".md"), (".jsonl", ".parquet")

HEAD = 8192  # bytes of a file that are looked at to tell whether it is text
# UTF-32's little-endian mark begins with UTF-16's
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _zstd(path),
}


class TextChunk(NamedTuple):
    """Some text of a corpus.

    Attributes:
        text: never empty, but for an end that comes alone.
        ends: whether a document ends behind it.
    """

    text: str
    ends: bool = False


@dataclass(frozen=True)
class TextFormat:
    """How files become text.

    Args:
        field: of the records in `.jsonl` and `.parquet`, the one that is the text.
        separator: in text files, what stands between two documents, and is no part of either; such as `<|endoftext|>`.
        errors: bytes that are invalid in the encoding: `strict` refuses them, `replace` makes each U+FFFD.
        encoding: of text files and `.jsonl`, by any name that Python has for it; kept as the codec's own name.
    """

    field: str = "text"
    separator: str | None = None
    errors: Literal["strict", "replace"] = "strict"
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("data.separator must be a text of at least one character, or null")
        if self.errors not in ("strict", "replace"):
            raise UserError(f"data.errors must be strict or replace, got '{self.errors}'")
        try:
            b"text".decode(self.encoding, "ignore")  # refuses codecs that are not for text, as `codecs.lookup` does not
            object.__setattr__(self, "encoding", codecs.lookup(self.encoding).name)
        except (LookupError, ValueError, TypeError):
            raise UserError(
                f"data.encoding must be a text encoding that Python knows, such as utf-16 or cp1252, got {self.encoding!r}"
            ) from None


def stretches(line: str) -> Iterator[str]:
    """A line, cut into stretches of at most `MAX_LINE` characters, before a space where there is one."""
    start = 0
    while len(line) - start > MAX_LINE:
        end = _end_of_stretch(line, start)
        yield line[start:end]
        start = end
    yield line[start:]


def _end_of_stretch(line: str, start: int) -> int:
    """Where the stretch from `start` on ends, in a line that goes on for more than `MAX_LINE` characters."""
    space = line.rfind(" ", start + 1, start + MAX_LINE + 1)
    return start + MAX_LINE if space == -1 else space


def slice_passages(passages: Iterable[TextChunk], start: int, stop: int | None) -> Iterator[TextChunk]:
    position = 0
    for text, ends in passages:
        first, position = position, position + len(text)
        if stop is not None and first >= stop and text:
            return
        if position > start:
            kept = text[max(0, start - first) : None if stop is None else stop - first]
            yield TextChunk(kept, ends and (stop is None or position <= stop))  # an end goes with what it ends


def cut_between_lines(passages: Iterable[TextChunk]) -> Iterator[TextChunk]:
    held = ""
    for text, ends in passages:
        held += text
        if ends:
            yield TextChunk(held, True)
            held = ""
        elif len(held) >= PASSAGE:
            end = held.rfind("\n") + 1
            while not end or len(held) - end >= PASSAGE:  # inside a line longer than that
                end = _end_of_stretch(held, end)
            yield TextChunk(held[:end])
            held = held[end:]
    if held:
        yield TextChunk(held)


def _suffixes(path: PurePath) -> tuple[str, str]:
    """A file's last suffix, that of its packing apart, and that of its packing; empty where there is none."""
    found = [suffix.lower() for suffix in path.suffixes]
    packed = found.pop() if found and found[-1] in PACKED else ""
    return (found[-1] if found else ""), packed


def kind_of(path: Path) -> tuple[str, str]:
    """The suffix that tells what a file holds, and the one that tells how it is packed, if it is."""
    suffix, packed = _suffixes(path)
    return (suffix if suffix in RECORD_SUFFIXES else ".txt"), packed


def is_text(name: str) -> bool:
    """Whether a file in a folder is one to read; one that the user names is read whatever it is called."""
    return _suffixes(PurePosixPath(name))[0] in TEXT_SUFFIXES + RECORD_SUFFIXES


def suffixes() -> str:
    return ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES) + f" (also packed: {', '.join(PACKED)})"


def unreadable(source: object, error: BaseException) -> UserError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"corpus '{source}' cannot be read ({reason}): check the file and its permissions")


def read_file(path: Path, reading: TextFormat, has_documents: bool, source: str) -> Iterator[TextChunk]:
    name = source if str(path) == str(Path(source).expanduser()) else f"{source}: {path.name}"
    kind, packed = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, packed, reading, name)
            return
        with PACKED[packed](path) if packed else path.open("rb") as file:
            if kind == ".jsonl":
                yield from _jsonl(file, reading, name)
            else:
                chunks = _decoded(file, reading, name)
                yield from _separated(chunks, reading.separator) if reading.separator else map(TextChunk, chunks)
                if has_documents:
                    yield TextChunk("", True)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"corpus '{name}' is damaged or cut ({error}): unpack or fetch it again") from None
    except OSError as error:
        raise unreadable(name, error) from None


def _zstd(path: Path) -> Any:
    """Opens it with Python's own module, from 3.14 on, or with the same for earlier ones."""
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        zstd = importlib.import_module(name)
    except ImportError:
        raise UserError(f"'{path}' needs {name} to be read: pip install 'lmlight[formats]'") from None

    def opened() -> Any:
        with zstd.open(path, "rb") as file:
            try:
                yield file
            except zstd.ZstdError as error:
                raise EOFError(str(error)) from None

    return contextmanager(opened)()


def _decoded(file: BinaryIO, reading: TextFormat, name: str) -> Iterator[str]:
    """A file's characters, a block at a time.

    Raises:
        UserError: it looks binary, or as if it had another encoding; a byte is invalid, whose offset is given.
    """
    decoder = codecs.getincrementaldecoder(reading.encoding)(reading.errors)
    offset, ascii_so_far = 0, True
    while True:
        block = file.read(PASSAGE)
        if not offset:
            _check_head(block, reading, name)
        held = len(decoder.getstate()[0])  # bytes of a character that goes on in this block
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = f"offset {offset - held + error.start:,}"
            raise _undecodable(error, where, reading, name, ascii_so_far) from None
        except UnicodeError as error:  # UTF-16 and UTF-32 without the mark that tells the byte order
            likely = _wide_encoding(block[:HEAD])
            advice = (
                f"it looks like {likely}, pass --data.encoding {likely}" if likely else "pass another --data.encoding"
            )
            raise UserError(f"corpus '{name}' is not {reading.encoding} ({error}): {advice}") from None
        if reading.encoding != "utf-8":  # UTF-7 and escapes can stand for an unpaired surrogate
            text = _whole_characters(text, reading, name, f"the block at offset {offset:,}")
        if text:
            yield text
        if not block:
            return
        offset += len(block)
        ascii_so_far = ascii_so_far and text.isascii()


def _check_head(block: bytes, reading: TextFormat, name: str) -> None:
    """Refuses what the first bytes of a file show not to be text in this encoding."""
    head = block[:HEAD]
    # A stray NUL is a character like others. UTF-16, archives and programs have many more, though much of them is UTF-8.
    nuls = head.decode(reading.encoding, "ignore").count("\0")
    if nuls <= len(head) / 100 and not (reading.encoding == "utf-8" and head.startswith(tuple(BYTE_ORDER_MARKS))):
        return
    if likely := _wide_encoding(head):
        raise UserError(
            f"corpus '{name}' looks like {likely} but is being read as {reading.encoding}: pass --data.encoding {likely}"
        )
    raise UserError(
        f"corpus '{name}' looks binary ({nuls:,} of its first {len(head):,} bytes are NUL): pass a text file, and "
        "--data.encoding if it is not UTF-8"
    )


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, if a file begins with a byte order mark or its zero bytes are where one of them has them."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        # spaces and line breaks alone are a tenth of most scripts; with the bytes swapped, hardly anything is ASCII
        if "\0" not in text and sum(map(str.isascii, text)) > len(text) / 10:
            return encoding
    return None


def _undecodable(
    error: UnicodeDecodeError, where: str, reading: TextFormat, name: str, ascii_before: bool
) -> UserError:
    """The error for an invalid byte.

    Args:
        error: gives the bytes of the block or line.
        where: the place of the byte.
        reading: gives the encoding.
        name: of the file.
        ascii_before: whether all that came before them is ASCII.
    """
    data, advice = error.object, "set --data.encoding to the file's encoding"
    encoding = "UTF-8" if reading.encoding == "utf-8" else reading.encoding
    if reading.encoding == "utf-8" and ascii_before and data[: error.start].isascii():
        # Western European: some letters beyond ASCII among many in it
        if sum(byte > 0x7F for byte in data) < len(data) / 4 and error.reason != "unexpected end of data":
            likely = "latin-1" if re.search(rb"[\x81\x8d\x8f\x90\x9d]", data) else "cp1252"  # undefined in cp1252
            advice = f"it looks like {likely}, pass --data.encoding {likely}"
    elif reading.encoding == "utf-8":  # what came before has characters of several bytes: UTF-8 with a damaged place
        advice = "repair the file"
    return UserError(
        f"corpus '{name}' is not {encoding} (byte 0x{data[error.start]:02x} at {where}): {advice}, or pass --data.errors "
        "replace to read invalid bytes as U+FFFD"
    )


def _separated(chunks: Iterable[str], separator: str) -> Iterator[TextChunk]:
    held = ""
    for chunk in chunks:
        *whole, held = (held + chunk).split(separator)
        yield from (TextChunk(text, True) for text in whole)
        safe = len(held) - len(separator) + 1  # from here on it may be the beginning of a separator
        if safe > 0:
            yield TextChunk(held[:safe])
            held = held[safe:]
    yield TextChunk(held, True)


def _jsonl(file: BinaryIO, reading: TextFormat, name: str) -> Iterator[TextChunk]:
    for number, content in enumerate(_lines(file, reading, name), start=1):
        where = f"line {number:,}"
        if number == 1:
            content = content.removeprefix("\ufeff")  # a byte order mark, which JSON has no use for
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            raise UserError(f"corpus '{name}' is not JSON Lines ({where}): expected one object in each line") from None
        if not isinstance(record, dict) or reading.field not in record:
            there = ", ".join(map(str, record)) if isinstance(record, dict) else "no fields"
            raise _no_field(name, reading.field, where, there)
        yield from _record(record[reading.field], reading, name, where)


def _lines(file: BinaryIO, reading: TextFormat, name: str) -> Iterator[str]:
    """A file's lines. Those of UTF-8 are decoded one by one, so that an error can tell which."""
    if reading.encoding != "utf-8":
        held = list[str]()
        for text in _decoded(file, reading, name):
            *whole, rest = text.split("\n")
            for line in whole:
                yield "".join((*held, line))
                held.clear()
            held.append(rest)
        yield "".join(held)
        return
    ascii_so_far = True
    for number, encoded in enumerate(file, start=1):
        if number == 1:
            _check_head(encoded, reading, name)
        try:
            content = encoded.decode("utf-8", reading.errors)
        except UnicodeDecodeError as error:
            where = f"line {number:,}, offset {error.start:,}"
            raise _undecodable(error, where, reading, name, ascii_so_far) from None
        ascii_so_far = ascii_so_far and encoded.isascii()
        yield content


def _no_field(name: str, field: str, where: str, there: str) -> UserError:
    return UserError(f"corpus '{name}' has no field '{field}' in {where} (there is {there}): pass --data.field")


def _record(text: Any, reading: TextFormat, name: str, where: str) -> Iterator[TextChunk]:
    """A record's text as a document; nothing where it is null."""
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(
            f"corpus '{name}' has a {type(text).__name__} as '{reading.field}' in {where}, where text is wanted: "
            "pass --data.field"
        )
    yield TextChunk(_whole_characters(text, reading, name, where), True)


def _whole_characters(text: str, reading: TextFormat, name: str, where: str) -> str:
    """Text without lone surrogates, which JSON and some encodings can write and UTF-8 cannot."""
    lone = re.search("[\ud800-\udfff]", text)
    if lone and reading.errors == "strict":
        raise UserError(
            f"corpus '{name}' has an unpaired surrogate (\\u{ord(lone[0]):04x}) in {where}: pass --data.errors replace to "
            "continue with U+FFFD in such places"
        )
    return re.sub("[\ud800-\udfff]", "\ufffd", text) if lone else text


def _parquet(path: Path, packed: str, reading: TextFormat, name: str) -> Iterator[TextChunk]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"'{path}' needs pyarrow to be read: pip install 'lmlight[formats]'") from None
    if packed:
        raise UserError(f"'{path}' is packed twice: unpack it, a .parquet file is compressed inside")
    try:
        with parquet.ParquetFile(path) as file:
            if reading.field not in file.schema_arrow.names:
                raise _no_field(name, reading.field, "its columns", ", ".join(file.schema_arrow.names))
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[reading.field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield from _record(text, reading, name, f"row {row:,}")
    except ArrowException as error:
        raise UserError(f"corpus '{name}' is not a readable .parquet file ({str(error).splitlines()[0]})") from None
