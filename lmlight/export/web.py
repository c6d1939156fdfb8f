"""`lmlight export web` and `lmlight play`: a web page that runs a model, to explore locally or publish.

The page's source is in `page/`. Its libraries are downloaded once, with npm or from a CDN, and cached.
"""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import requests

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.command_line import Parser
from lmlight.data.cache import cache_dir, writing_cache
from lmlight.data.download import BUILTIN_CORPORA
from lmlight.errors import UserError, reason
from lmlight.export.graph import write_onnx
from lmlight.export.model import Model
from lmlight.export.tokenizer import tokenizer_json
from lmlight.generation import Sampling

PAGE = Path(__file__).with_name("page")
SOURCES = ("index.html", "style.css", "page.js", "model.js", "settings.js", "tokens.js", "attention.js")
FILES = (*SOURCES, "model.onnx", "model.json", "engine/*.mjs", "engine/*.wasm", "notebooks/0?-*.ipynb")
WEBGPU_FROM = 64 * 2**20  # above this .onnx file size, WebGPU is worth its startup and per-token overhead
# MIME types, because those configured on this machine may differ
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}
TYPES |= {".json": "application/json", ".wasm": "application/wasm"}
CDN = "https://cdn.jsdelivr.net/npm"


def write(model: Model, folder: Path) -> None:
    """Write the page of a model to a folder.

    Raises:
        UserError: The network or the tokenizer cannot be exported; the libraries cannot be downloaded.
    """
    tokenizer_json(model.tokenizer)  # raises if it is lossy; `write_onnx` would omit it
    write_onnx(model, folder / "model.onnx", attention=True)
    engine = "webgpu" if (folder / "model.onnx").stat().st_size > WEBGPU_FROM else "wasm"
    for name in SOURCES:
        shutil.copyfile(PAGE / name, folder / name)  # not `copy`: read-only permissions would prevent the fsync
    (folder / "engine").mkdir()
    for package, engines in json.loads((PAGE / "libraries.json").read_text("utf-8")).items():
        for path in _library(package, engines[engine]):
            shutil.copyfile(path, folder / "engine" / path.name)
    notebooks = PAGE / "notebooks"  # in a wheel
    (folder / "notebooks").mkdir()
    for path in (notebooks if notebooks.is_dir() else PAGE.parents[2] / "notebooks").glob("0?-*.ipynb"):
        shutil.copyfile(path, folder / "notebooks" / path.name)
    corpus = model.corpus_name()
    vocabulary = f"a vocabulary of {model.net.vocab_size:,} tokens"
    facts = [f"{model.net.num_parameters:,} parameters", vocabulary, f"a context of {model.net.block_size:,} tokens"]
    if nats := model.metrics.get("val/nats_per_char"):
        facts.append(f"{nats:.4f} nats per character after {model.step:,} steps")
    content = {
        "name": Path(corpus).stem or "model",
        "facts": ", ".join(facts),
        "prompt": BUILTIN_CORPORA[corpus].sample_prompt if corpus in BUILTIN_CORPORA else "",
        "sampling": asdict(Sampling(**model.sampling)),
        "engine": engine,
    }
    (folder / "model.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _library(package: str, hashes: dict[str, str]) -> list[Path]:
    """Files of an npm package in the cache, by name and SHA-256."""
    folder = cache_dir() / "web" / package.rpartition("/")[2]
    found = {name: (folder / name).read_bytes() if (folder / name).is_file() else b"" for name in hashes}
    if missing := [name for name, content in found.items() if _sha256(content) != hashes[name]]:
        try:
            contents = _download(package, missing)
        except OSError as error:  # includes the exceptions of requests
            raise UserError(
                f"{package}, which the page needs, could be downloaded neither with npm nor from a content delivery network "
                f"({type(error).__name__}): check the network connection"
            ) from None
        for name, content in zip(missing, contents, strict=True):
            if _sha256(content) != hashes[name]:
                raise UserError(f"'{name}' of {package} does not have the expected SHA-256, so it was not used")
            with writing_cache(folder):
                (folder / name).unlink(missing_ok=True)  # if it is damaged
                with files.whole(folder / name, shared=True) as beside:
                    beside.write_bytes(content)
    return [folder / name for name in hashes]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(package: str, names: list[str]) -> list[bytes]:
    """Files of an npm package: with npm, which uses a configured mirror, or else from a content delivery network."""
    npm, quiet = shutil.which("npm"), subprocess.DEVNULL
    if npm:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):  # whatever npm's problem is
            command = [npm, "pack", "--fetch-retries=0", package]
            subprocess.run(command, cwd=folder, check=True, stdin=quiet, stdout=quiet, stderr=quiet, timeout=300)
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as members:
                return [file.read() for name in names if (file := members.extractfile(f"package/dist/{name}"))]
    answers = [requests.get(f"{CDN}/{package}/dist/{name}", timeout=60) for name in names]
    for answer in answers:
        answer.raise_for_status()
    return [answer.content for answer in answers]


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = TYPES

    def send_head(self) -> Any:
        # against DNS rebinding: another site's name may resolve to this machine
        if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
            return self.send_error(403)
        return super().send_head()

    def end_headers(self) -> None:
        # only a cross-origin isolated page may use threads
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = os.name != "nt"  # on Windows, it would let two servers share a port

    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*request)  # a browser that closes a connection is not an error


def play(args: Sequence[str]) -> None:
    """Runs `lmlight play`, until Ctrl-C."""
    parser = Parser("lmlight play", description="Explore a model in a web page, which only this machine can open.")
    parser.add_argument("checkpoint", nargs="?", default="best", help="a .ckpt file, a run's folder, `best` or `last`")
    parser.add_argument("--port", type=int, default=8420, help="port of the page (default: 8420); 0 picks a free one")
    parser.add_argument("--no-browser", action="store_true", help="print the URL without opening a browser")
    parser.add_checkpoint_flags()
    options = parser.parse_args(args)
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        try:
            server = _Server(("127.0.0.1", options.port), functools.partial(_Handler, directory=folder))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {options.port} cannot be used ({reason(error)}): pass another --port") from None
        with server:
            source = checkpoints.find(options.checkpoint, options.runs, "best")
            print(f"Preparing the page for {files.shown(source)}", flush=True)
            trusted, _ = checkpoints.import_classes(options.net, options.tokenizer)
            write(Model.read(source, trusted), Path(folder))
            url = f"http://127.0.0.1:{server.server_port}/"
            print(f"{url} (press Ctrl-C to stop)", flush=True)
            if not options.no_browser:
                webbrowser.open(url)
            server.serve_forever()
