"""`lmlight export web` and `lmlight play`: a page that runs a model, to be opened, explored and published.

The page's source is in `page/`. Its libraries come from npm, once; then they are in the cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import webbrowser
from collections.abc import Iterable, Sequence
from pathlib import Path

import requests

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.command_line import Parser
from lmlight.data.cache import cache_dir, writing_cache
from lmlight.data.download import BUILTIN_CORPORA
from lmlight.errors import UserError
from lmlight.export.graph import write_onnx
from lmlight.export.model import Model

PAGE = Path(__file__).with_name("page")
FILES = ("index.html", "style.css", "model.js", "page.js", "model.onnx", "model.json", "engine", "notebooks")
LARGE = 64 * 2**20  # bytes of an .onnx file from which WebGPU is worth its start and its overhead for each token
CDN = "https://cdn.jsdelivr.net/npm"


def write(model: Model, folder: Path) -> None:
    """Write the page of a model to a folder.

    Raises:
        UserError: The network or the tokenizer cannot be exported; the libraries cannot be downloaded.
    """
    write_onnx(model, folder / "model.onnx", attention=True)
    engine = "webgpu" if (folder / "model.onnx").stat().st_size > LARGE else "wasm"
    for path in PAGE.iterdir():
        if path.name in FILES and path.is_file():
            shutil.copy(path, folder)
    (folder / "engine").mkdir()
    for package, engines in json.loads((PAGE / "libraries.json").read_text("utf-8")).items():
        for path in _library(package, engines[engine]):
            shutil.copy(path, folder / "engine")
    notebooks = PAGE / "notebooks"  # in a wheel
    shutil.copytree(notebooks if notebooks.is_dir() else PAGE.parents[2] / "notebooks", folder / "notebooks")
    corpus = str(model.settings.get("data", {}).get("corpus", ""))
    vocabulary = f"a vocabulary of {model.net.vocab_size:,} tokens"
    facts = [f"{model.net.num_parameters:,} parameters", vocabulary, f"a context of {model.net.block_size:,} tokens"]
    if nats := model.metrics.get("val/nats_per_char"):
        facts.append(f"{nats:.4f} nats per character after {model.step:,} steps")
    content = {
        "name": Path(corpus).stem or "model",
        "facts": ", ".join(facts),
        "prompt": BUILTIN_CORPORA[corpus].sample_prompt if corpus in BUILTIN_CORPORA else "",
        "sampling": model.sampling,
        "engine": engine,
    }
    (folder / "model.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _library(package: str, hashes: dict[str, str]) -> list[Path]:
    """Files of an npm package in the cache, by name and SHA-256: from npm, or if that is missing from a CDN."""
    folder = cache_dir() / "web" / package.rpartition("/")[2]
    if not all((folder / name).is_file() for name in hashes):
        try:
            npm = shutil.which("npm")
            contents = _from_npm(npm, package, hashes) if npm else [_from_cdn(package, name) for name in hashes]
        except (OSError, KeyError, subprocess.CalledProcessError) as error:  # those of requests are OSErrors
            detail = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
            raise UserError(f"{package}, which the page needs, cannot be downloaded ({detail})") from None
        for (name, sha256), content in zip(hashes.items(), contents):
            if hashlib.sha256(content).hexdigest() != sha256:
                raise UserError(f"'{name}' of {package} is not the file that it should be, and was not used")
            with writing_cache(folder), files.whole(folder / name, shared=True) as beside:
                beside.write_bytes(content)
    return [folder / name for name in hashes]


def _from_cdn(package: str, name: str) -> bytes:
    answer = requests.get(f"{CDN}/{package}/dist/{name}", timeout=60)
    answer.raise_for_status()
    return answer.content


def _from_npm(npm: str, package: str, names: Iterable[str]) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([npm, "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as members:
            return [members.extractfile(f"package/dist/{name}").read() for name in names]  # type: ignore[union-attr]


class _Handler(http.server.SimpleHTTPRequestHandler):
    # Windows may have other types for these
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012
    extensions_map |= {".js": "text/javascript", ".wasm": "application/wasm"}

    def end_headers(self) -> None:
        # an isolated page may use threads
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = os.name != "nt"  # which would let two servers share a port there


def play(args: Sequence[str]) -> None:
    """Runs `lmlight play`, until Ctrl-C.

    Raises:
        UserError: See `write`; the port is taken.
    """
    parser = Parser("lmlight play", description="Explore a model in a web page, which only this machine can open.")
    parser.add_argument(
        "checkpoint", nargs="?", default="best", help="a .ckpt file, a run's folder, or `best` or `last`"
    )
    parser.add_argument(
        "--port", type=int, default=8420, help="where the page is served (default: 8420); 0 takes a free one"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    checkpoints.add_arguments(parser)
    options = parser.parse_args(args)
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        try:
            server = _Server(("127.0.0.1", options.port), functools.partial(_Handler, directory=folder))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {options.port} cannot be used ({error}): pass another --port") from None
        with server:
            trusted, _ = checkpoints.import_classes(options.net, options.tokenizer)
            write(Model.read(checkpoints.find(options.checkpoint, options.runs, "best"), trusted), Path(folder))
            address = f"http://127.0.0.1:{server.server_port}/"
            print(f"{address} (Ctrl-C ends it)", flush=True)
            if not options.no_browser:
                webbrowser.open(address)
            server.serve_forever()
