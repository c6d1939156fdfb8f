"""`lmlight export web` and `lmlight play` without a browser; what the page does is in test_page.py."""

import hashlib
import json
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import processes
import pytest
import requests
from exporting import make, save

from lmlight.__main__ import main
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.export import web
from lmlight.models import Bigram

pytest.importorskip("onnxscript", reason="needs the extra `onnx`")


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """Stand-ins for the libraries of the page, in the cache."""
    contents, page = {}, tmp_path / "page"
    page.mkdir()
    for path in web.PAGE.iterdir():
        if path.is_file():
            (page / path.name).write_bytes(path.read_bytes())
    lock = json.loads((page / "libraries.json").read_text())
    for engines in lock.values():
        for names in engines.values():
            for name in names:
                contents[name] = name.encode()
                names[name] = hashlib.sha256(contents[name]).hexdigest()
    (page / "libraries.json").write_text(json.dumps(lock))
    (page / "notebooks").mkdir()
    monkeypatch.setattr(web, "PAGE", page)
    monkeypatch.setattr(web.shutil, "which", lambda name: None)  # no npm

    def get(url, timeout):
        answer = requests.Response()
        answer.status_code, answer._content = 200, contents[url.rpartition("/")[2]]
        return answer

    monkeypatch.setattr(web.requests, "get", get)
    return contents


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = CharTokenizer("abc\n")
    return str(save(tmp_path / "x.ckpt", make(tokenizer, {}), tokenizer))


def test_export_writes_a_whole_page(libraries, checkpoint, capsys):
    assert main(["export", "web", checkpoint, "site"]) == 0
    assert capsys.readouterr() == ("Wrote site from x.ckpt\n", "")
    assert {path.name for path in Path("site").iterdir()} == {name.partition("/")[0] for name in web.FILES}
    engine = {path.name: path.read_bytes() for path in Path("site/engine").iterdir()}
    assert set(engine) == {
        "ort.wasm.min.mjs",
        "ort-wasm-simd-threaded.mjs",
        "ort-wasm-simd-threaded.wasm",
        "tokenizers.min.mjs",
    }
    assert engine == {name: libraries[name] for name in engine}
    content = json.loads(Path("site/model.json").read_text("utf-8"))
    assert content["engine"] == "wasm"
    assert content["sampling"]["stop"] == [], "the page needs all options, also those that the checkpoint leaves out"
    assert main(["export", "web", checkpoint, "site", "--force"]) == 0
    Path("site/mine.html").touch()
    assert main(["export", "web", checkpoint, "site", "--force"]) == 2
    assert "contains 'mine.html'" in capsys.readouterr().err


def test_own_files_in_the_folders_of_a_page_stay(libraries, checkpoint, tmp_path, capsys):
    for folder in ("notebooks", "engine"):
        (tmp_path / folder / folder).mkdir(parents=True)
        (tmp_path / folder / folder / "mine.ipynb").write_text("precious")
        assert main(["export", "web", checkpoint, folder, "--force"]) == 2
        assert f"contains '{folder}/mine.ipynb', which is not part of an export" in capsys.readouterr().err
        assert (tmp_path / folder / folder / "mine.ipynb").exists()


def test_large_model_gets_the_engine_with_webgpu(libraries, checkpoint, monkeypatch):
    monkeypatch.setattr(web, "WEBGPU_FROM", 1)
    assert main(["export", "web", checkpoint, "site"]) == 0
    assert json.loads(Path("site/model.json").read_text("utf-8"))["engine"] == "webgpu"
    assert Path("site/engine/ort.webgpu.min.mjs").is_file()


@pytest.mark.parametrize("fault", ["changed", "offline"])
def test_libraries_that_cannot_be_had_are_one_line_and_leave_nothing(fault, libraries, checkpoint, capsys, monkeypatch):
    if fault == "changed":
        libraries["tokenizers.min.mjs"] = b"something else"
    else:

        def offline(*_, **__):
            raise requests.ConnectionError("no route")

        monkeypatch.setattr(web.requests, "get", offline)
    assert main(["export", "web", checkpoint, "site"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lmlight: error: ") and err.count("\n") == 1
    assert ("was not used" if fault == "changed" else "(ConnectionError): check the network connection") in err
    assert not Path("site").exists()


def test_npm_does_not_read_from_the_terminal(libraries, checkpoint, monkeypatch):
    inputs = []

    def run(*_, stdin, **__):
        inputs.append(stdin)
        raise OSError

    monkeypatch.setattr(web.shutil, "which", lambda name: name)
    monkeypatch.setattr(web.subprocess, "run", run)
    assert main(["export", "web", checkpoint, "site"]) == 0
    assert set(inputs) == {web.subprocess.DEVNULL}


def test_damaged_library_in_the_cache_is_fetched_again(libraries, checkpoint, tmp_path):
    assert main(["export", "web", checkpoint, "site"]) == 0
    (cached,) = (tmp_path / "cache/web").glob("*/tokenizers.min.mjs")
    cached.write_bytes(b"half")
    assert main(["export", "web", checkpoint, "again"]) == 0
    assert Path("again/engine/tokenizers.min.mjs").read_bytes() == libraries["tokenizers.min.mjs"]


def test_lossy_tokenizer_is_refused(libraries, corpus_text, capsys, tmp_path):
    lossy = TokenizerConfig("unigram", 200, lossless=False).train(corpus_text)
    path = save(tmp_path / "lossy.ckpt", Bigram(lossy.vocab_size, 16), lossy)
    assert main(["export", "web", str(path), "site"]) == 2
    assert "tokenizer is lossy" in capsys.readouterr().err
    assert not Path("site").exists()


def test_plain_export_has_no_attention(libraries, checkpoint):
    onnx = pytest.importorskip("onnx")
    assert main(["export", "onnx", checkpoint, "plain.onnx"]) == 0
    assert main(["export", "web", checkpoint, "site"]) == 0
    plain, page = (onnx.load(path).graph for path in ("plain.onnx", "site/model.onnx"))
    assert [output.name for output in plain.output] == ["logits", "present"]
    assert [output.name for output in page.output] == ["logits", "present", "attention"]


def test_play_refuses_a_port_that_is_taken(libraries, checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["play", checkpoint, "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lmlight: error: port {port} cannot be used (") and err.count("\n") == 1


def test_play_serves_on_this_machine_only_until_ctrl_c(libraries, checkpoint, tmp_path):
    code = f"""if True:
        import sys
        from pathlib import Path
        from lmlight.__main__ import main
        from lmlight.export import web
        web.PAGE = Path({str(web.PAGE)!r})
        web._library = lambda package, hashes: []
        sys.exit(main(["play", {checkpoint!r}, "--port=0", "--no-browser"]))"""
    with processes.start(code=code) as process:
        try:
            assert process.stdout.readline() == "Preparing the page for x.ckpt\n"
            address = process.stdout.readline().split()[0]
            with urllib.request.urlopen(address + "index.html") as answer:
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert b"Content-Security-Policy" in answer.read()
            port = int(address.rstrip("/").rpartition(":")[2])
            request = urllib.request.Request(address + "model.json", headers={"Host": f"evil.example:{port}"})
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(request)
            request = urllib.request.Request(address + "model.json", headers={"Host": "localhost"})  # as at port 80
            assert urllib.request.urlopen(request).status == 200
            if sys.platform == "linux":  # which routes all of 127/8 to this machine
                with pytest.raises(OSError, match="refused"):
                    socket.create_connection(("127.0.0.2", port), timeout=2)
        finally:  # `with` waits for its end
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in err
