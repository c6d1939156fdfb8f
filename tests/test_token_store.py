"""Token stores: incomplete or damaged ones are never read, and shards read as one array."""

import errno
import json
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmlight.data import reading, token_store, token_writer
from lmlight.data.reading import TextChunk
from lmlight.data.token_store import TokenArray, TokenStore
from lmlight.data.token_writer import read_tokenizer, write_store
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.data.workers import process_pool
from lmlight.errors import UserError

ABC = CharTokenizer("abc\n")
TEXTS = {"train": [TextChunk("abcabc\ncab" * 3)], "val": [TextChunk("cab")]}


@pytest.fixture
def folder(tmp_path):
    """The folder of a store of `TEXTS` with the fingerprint `print`."""
    folder = tmp_path / "tokens" / "store"
    write_store(folder, "print", TEXTS, ABC)
    return folder


# The store


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_store_returns_ids_characters_and_tokenizer(tmp_path, corpus_text, kind):
    tokenizer = TokenizerConfig(kind, 400).train(corpus_text)
    texts = {"train": corpus_text[:4000], "val": corpus_text[4000:]}
    pieces = {split: [TextChunk(text)] for split, text in texts.items()}
    write_store(tmp_path / "deep" / "down" / "store", "print", pieces, tokenizer)
    store = TokenStore(tmp_path / "deep" / "down" / "store", "print")
    assert {split: ids[:].tolist() for split, ids in store.ids.items()} == {
        split: tokenizer.encode(text) for split, text in texts.items()
    }
    assert store.chars == {split: len(text) for split, text in texts.items()}
    assert store.tokenizer.fingerprint == tokenizer.fingerprint
    assert {ids.dtype for ids in store.ids.values()} == {np.dtype(np.uint16)}
    assert all(isinstance(ids.shard(0).base.obj, mmap.mmap) for ids in store.ids.values())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_dtype_fits_the_largest_id(tmp_path, vocab_size, dtype):
    tokenizer = CharTokenizer(chr(0x10000 + index) for index in range(vocab_size))
    write_store(tmp_path / "store", "print", {"train": [TextChunk(tokenizer.decode([0, vocab_size - 1]))]}, tokenizer)
    ids = TokenStore(tmp_path / "store", "print").ids["train"]
    assert ids[:].tolist() == [0, vocab_size - 1]
    assert ids.dtype == dtype


def test_store_with_another_fingerprint_is_refused(folder):
    with pytest.raises(UserError, match="another text or tokenizer") as caught:
        TokenStore(folder, "another print")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["index.json", "train-00000.npy", "tokenizer"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"\x01\x02 garbage"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[]"),
    ],
    ids=["removed", "cut", "cut to its head", "garbled", "empty", "other JSON"],
)
def test_damaged_store_is_refused_with_a_remedy(folder, damage, name):
    damage(folder / name)
    with pytest.raises(UserError, match="delete that folder") as caught:
        TokenStore(folder, "print")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="delete that folder"):
        TokenStore(tmp_path / "absent", "print")


def test_finished_store_is_never_overwritten(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_store(folder, "other", {"train": [TextChunk("a")]}, CharTokenizer("a"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["store"]


class Failing(CharTokenizer):
    def encode_chunks(self, chunks):
        if "cab" in (chunk.text for chunk in chunks):
            raise UserError("no such character")
        return super().encode_chunks(chunks)


class Forgetful(CharTokenizer):
    def encode_chunks(self, chunks):
        return super().encode_chunks(chunks)[1:]


@pytest.mark.parametrize(("tokenizer", "error"), [(Failing, UserError), (Forgetful, UserError)])
def test_failed_write_leaves_nothing_behind(tmp_path, tokenizer, error):
    with pytest.raises(error):
        write_store(tmp_path / "tokens" / "store", "print", TEXTS, tokenizer("abc\n"))
    assert list((tmp_path / "tokens").iterdir()) == []


def test_index_is_readable_without_lmlight(folder):
    assert json.loads((folder / "index.json").read_text()) == {
        "format_version": token_store.FORMAT_VERSION,
        "fingerprint": "print",
        "dtype": "uint16",
        "splits": {"train": {"chars": 30, "tokens": [30]}, "val": {"chars": 3, "tokens": [3]}},
        "metadata": {},
    }
    assert np.load(folder / "val-00000.npy").tolist() == [2, 0, 1]


# Shards


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(token_writer, "SHARD_CHARS", 1000)
    monkeypatch.setattr(token_writer, "BATCH_CHARS", 300)


def pieces_of(text):
    return [TextChunk(line + "\n") for line in text.split("\n")[:-1]]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path, small_shards, corpus_text):
    tokenizer = TokenizerConfig("unigram", 400).train(corpus_text)
    for processes in (1, 2):
        write_store(
            tmp_path / str(processes), "print", {"train": pieces_of(corpus_text)}, tokenizer, processes=processes
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 2 + len(corpus_text) // 1000
    read = TokenStore(tmp_path / "2", "print")
    assert read.ids["train"][:].tolist() == tokenizer.encode(corpus_text)
    assert read.chars == {"train": len(corpus_text)}


def test_interrupted_write_continues_with_the_next_shard(tmp_path, small_shards, corpus_text, monkeypatch):
    """The disk is full after three shards: they are kept, are no store, and are not written again."""
    tokenizer = CharTokenizer(sorted(set(corpus_text)))
    save, saved = np.save, []

    def save_three(file, ids):
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(len(ids))
        save(file, ids)

    monkeypatch.setattr(np, "save", save_three)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_store(tmp_path / "store", "print", {"train": pieces_of(corpus_text)}, tokenizer, processes=1)
    assert sorted(contents(tmp_path / "store")) == ["tokenizer", *(f"train-0000{n}.npy" for n in range(3))]
    assert not TokenStore.is_finished(tmp_path / "store")
    with pytest.raises(UserError):
        TokenStore(tmp_path / "store", "print")
    assert read_tokenizer(tmp_path / "store").fingerprint == tokenizer.fingerprint
    monkeypatch.setattr(np, "save", lambda file, ids: saved.append(len(ids)) or save(file, ids))
    write_store(tmp_path / "store", "print", {"train": pieces_of(corpus_text)}, tokenizer, processes=1)
    assert sum(saved) == len(corpus_text), "each shard is written once"
    assert TokenStore(tmp_path / "store", "print").ids["train"][:].tolist() == tokenizer.encode(corpus_text)


@pytest.mark.parametrize(("content", "kept"), [(b"a drive fails", True), (b"not UTF-8: \xff", False)])
def test_finished_shards_are_kept_only_if_the_text_may_be_readable(
    tmp_path, small_shards, corpus_text, monkeypatch, content, kept
):
    def check_head(head, *rest):
        if head == b"a drive fails":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def chunks():
        yield from pieces_of(corpus_text)
        yield from reading.read_file(tmp_path / "text.txt", reading.TextFormat(), False, "text.txt")

    monkeypatch.setattr(reading, "_check_head", check_head)
    (tmp_path / "text.txt").write_bytes(content)
    tokenizer = CharTokenizer(sorted(set(corpus_text)))
    with pytest.raises(UserError, match=os.strerror(errno.EIO) if kept else "not utf-8"):
        write_store(tmp_path / "store", "print", {"train": chunks()}, tokenizer, processes=1)
    assert (tmp_path / "store" / "train-00000.npy").exists() == kept


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")
def test_killed_worker_is_reported_and_finished_shards_stay(tmp_path, small_shards):
    def chunks():
        yield from [TextChunk("abcd" * 250)] * 3
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        yield from [TextChunk("abcd" * 250)] * 10

    with pytest.raises(UserError, match="a worker process was killed"):
        write_store(tmp_path / "store", "print", {"train": chunks()}, CharTokenizer("abcd"), processes=2)
    assert read_tokenizer(tmp_path / "store")


def test_tokens_deleted_while_in_use_are_one_error(folder):
    store = TokenStore(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="were deleted while in use"):
        store.ids["train"][:3]


KILLED = """
import sys, time
from pathlib import Path
from lmlight.data import token_writer
from lmlight.data.reading import TextChunk
from lmlight.data.tokenizer import CharTokenizer
token_writer.SHARD_CHARS = 1000
def pieces():
    for number in range(20):
        yield TextChunk("abcd" * 250)
        time.sleep(0.1)
token_writer.write_store(Path("store"), "print", {"train": pieces()}, CharTokenizer("abcd"), processes=2)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_killed_write_leaves_whole_shards_and_no_processes(tmp_path, small_shards, how):
    """The script has no `if __name__ == "__main__"` guard."""
    (tmp_path / "script.py").write_text(KILLED)
    running = subprocess.Popen([sys.executable, "script.py"], stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "store" / "train-00002.npy").exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    running.send_signal(getattr(signal, how))
    running.wait(timeout=20)
    running.stderr.read()  # returns when all processes that hold it have ended
    running.stderr.close()
    folder = tmp_path / "store"
    assert not TokenStore.is_finished(folder)
    whole = sorted(folder.glob("train-*.npy"))
    assert 3 <= len(whole) < 20
    assert all(np.load(path).tolist() == [0, 1, 2, 3] * 250 for path in whole)
    before = {path: path.stat().st_mtime_ns for path in whole}
    write_store(folder, "print", {"train": [TextChunk("abcd" * 250)] * 20}, CharTokenizer("abcd"), processes=1)
    assert {path: path.stat().st_mtime_ns for path in whole} == before
    assert len(TokenStore(folder, "print").ids["train"]) == 20_000


def test_shard_of_wrong_length_is_refused(folder):
    np.save(folder / "val-00000.npy", np.zeros(4, np.uint16))
    with pytest.raises(UserError, match="val-00000.npy does not have 3 tokens"):
        TokenStore(folder, "print")


# The token array


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6), st.data())
def test_shards_read_as_one_array(tmp_path, parts, data):
    plain = np.array([i for part in parts for i in part], np.uint16)
    files = []
    for number, part in enumerate(parts):
        files.append(tmp_path / f"{number}.npy" if number % 2 else np.array(part, np.uint16))
        if number % 2:
            np.save(files[-1], np.array(part, np.uint16))
    ids = TokenArray(files, list(map(len, parts)), np.uint16)
    assert len(ids) == len(plain)
    start, stop = data.draw(st.tuples(st.integers(-40, 40), st.integers(-40, 40)))
    for part in (slice(None), slice(start, stop), slice(start, None)):
        assert ids[part].tolist() == plain[part].tolist()
        assert ids[part].dtype == np.uint16
    if len(plain):
        where = np.array(data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=12)), np.int64)
        assert ids[where].tolist() == plain[where].tolist()
        assert ids[where[:, None] * 0].tolist() == plain[where[:, None] * 0].tolist()
    assert ids.counts(10).tolist() == np.bincount(plain, minlength=10).tolist()
    assert ids.prepend(np.array([7]))[:].tolist() == [7, *plain]
    assert pickle.loads(pickle.dumps(ids))[:].tolist() == plain.tolist()


def test_pickled_token_array_does_not_contain_the_ids(tmp_path):
    np.save(tmp_path / "large.npy", np.zeros(100_000, np.uint16))
    ids = TokenArray([tmp_path / "large.npy"], [100_000], np.uint16)
    assert ids[5:9].tolist() == [0] * 4
    assert len(pickle.dumps(ids)) < 2000


def resident(folder):
    """Resident bytes of the files in a folder that this process has mapped."""
    size, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):
            here = str(folder) in line
        elif here and line.startswith("Rss:"):
            size += 1024 * int(line.split()[1])
    return size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux which pages are mapped")
def test_pages_that_were_read_are_not_kept_mapped(tmp_path):
    """Reading 16 MB in order and at random."""
    files = [tmp_path / f"{number}.npy" for number in range(8)]
    for file in files:
        np.save(file, np.ones(2**18, np.uint16))
    ids = TokenArray(files, [2**18] * 8, np.uint16)
    starts = np.random.default_rng(0).permutation(np.arange(0, len(ids) - 64, 2**11))
    for begin in range(0, len(starts), 32):
        ids[starts[begin : begin + 32, None] + np.arange(64)]
        assert resident(tmp_path) == 0
    for begin in range(0, len(ids), 2**17):
        ids[begin : begin + 2**17]
        assert resident(tmp_path) == 0


def test_windows_gets_no_more_processes_than_it_can_wait_for(monkeypatch):
    pool = process_pool(2)
    pool.shutdown()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        with pytest.raises(ValueError, match="61"):
            type(pool)(100)
        process_pool(100).shutdown()
