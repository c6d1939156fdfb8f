"""Files to text: what a text file, a `.jsonl` or a `.parquet` gives, in passages.

- Text is read as it is: no newline is translated, no mark dropped, so offsets and figures are exact.
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

PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _zstd(path),
}


class Passage(NamedTuple):
    """Some text of a corpus.

    Attributes:
        text: never empty, but for an end that comes alone.
        ends: whether a document ends behind it.
    """

    text: str
    ends: bool = False


@dataclass(frozen=True)
class Reading:
    """How files become text.

    Args:
        field: of the records in `.jsonl` and `.parquet`, the one that is the text.
        separator: in text files, what stands between two documents, and is no part of either; such as `<|endoftext|>`.
        errors: bytes that are not UTF-8: `strict` refuses them, `replace` makes each U+FFFD.
    """

    field: str = "text"
    separator: str | None = None
    errors: Literal["strict", "replace"] = "strict"

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("data.separator must be a text of at least one character, or null")
        if self.errors not in ("strict", "replace"):
            raise UserError(f"data.errors must be strict or replace, got '{self.errors}'")


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


def slice_passages(passages: Iterable[Passage], start: int, stop: int | None) -> Iterator[Passage]:
    position = 0
    for text, ends in passages:
        first, position = position, position + len(text)
        if stop is not None and first >= stop and text:
            return
        if position > start:
            kept = text[max(0, start - first) : None if stop is None else stop - first]
            yield Passage(kept, ends and (stop is None or position <= stop))  # an end goes with what it ends


def cut_between_lines(passages: Iterable[Passage]) -> Iterator[Passage]:
    held = ""
    for text, ends in passages:
        held += text
        if ends:
            yield Passage(held, True)
            held = ""
        elif len(held) >= PASSAGE:
            end = held.rfind("\n") + 1
            while not end or len(held) - end >= PASSAGE:  # inside a line longer than that
                end = _end_of_stretch(held, end)
            yield Passage(held[:end])
            held = held[end:]
    if held:
        yield Passage(held)


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


def read_file(path: Path, reading: Reading, has_documents: bool, source: str) -> Iterator[Passage]:
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
                yield from _separated(chunks, reading.separator) if reading.separator else map(Passage, chunks)
                if has_documents:
                    yield Passage("", True)
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


def _decoded(file: BinaryIO, reading: Reading, name: str) -> Iterator[str]:
    """A file's characters; of bytes that are not UTF-8, the first one's place is said."""
    decoder = codecs.getincrementaldecoder("utf-8")(reading.errors)
    offset = 0
    while True:
        block = file.read(PASSAGE)
        # A stray NUL is a character like others. UTF-16, archives and programs have many more, though much of them is UTF-8.
        if not offset and (nuls := block[:8192].count(0)) > len(block[:8192]) / 100:
            raise UserError(
                f"corpus '{name}' looks binary ({nuls:,} of its first {len(block[:8192]):,} bytes are NUL): pass UTF-8 text"
            )
        held = len(decoder.getstate()[0])  # bytes of a character that goes on in this block
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error.object[error.start], f"offset {offset - held + error.start:,}") from None
        if text:
            yield text
        if not block:
            return
        offset += len(block)


def _not_utf8(name: str, byte: int, where: str) -> UserError:
    return UserError(
        f"corpus '{name}' is not UTF-8 (byte 0x{byte:02x} at {where}): convert it first, for example with iconv -t UTF-8, "
        "or pass --data.errors replace to go on with U+FFFD in such places"
    )


def _separated(chunks: Iterable[str], separator: str) -> Iterator[Passage]:
    held = ""
    for chunk in chunks:
        *whole, held = (held + chunk).split(separator)
        yield from (Passage(text, True) for text in whole)
        safe = len(held) - len(separator) + 1  # from here on it may be the beginning of a separator
        if safe > 0:
            yield Passage(held[:safe])
            held = held[safe:]
    yield Passage(held, True)


def _jsonl(file: BinaryIO, reading: Reading, name: str) -> Iterator[Passage]:
    for number, line in enumerate(file, start=1):
        where = f"line {number:,}"
        try:
            content = line.decode("utf-8", reading.errors)
            if not content.strip():
                continue
            record = json.loads(content)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, line[error.start], f"{where}, offset {error.start:,}") from None
        except (ValueError, RecursionError):
            raise UserError(f"corpus '{name}' is not JSON Lines ({where}): expected one object in each line") from None
        if not isinstance(record, dict) or reading.field not in record:
            there = ", ".join(map(str, record)) if isinstance(record, dict) else "no fields"
            raise _no_field(name, reading.field, where, there)
        yield from _record(record[reading.field], reading, name, where)


def _no_field(name: str, field: str, where: str, there: str) -> UserError:
    return UserError(f"corpus '{name}' has no field '{field}' in {where} (there is {there}): pass --data.field")


def _record(text: Any, reading: Reading, name: str, where: str) -> Iterator[Passage]:
    """A record's text as a document; nothing where it is null."""
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(
            f"corpus '{name}' has a {type(text).__name__} as '{reading.field}' in {where}, where text is wanted: "
            "pass --data.field"
        )
    if lone := re.search("[\ud800-\udfff]", text):  # JSON can write half a character; UTF-8 cannot
        if reading.errors == "strict":
            raise UserError(
                f"corpus '{name}' has half a character (\\u{ord(lone[0]):04x}) in {where}: pass --data.errors replace to go "
                "on with U+FFFD in such places"
            )
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    yield Passage(text, True)


def _parquet(path: Path, packed: str, reading: Reading, name: str) -> Iterator[Passage]:
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
