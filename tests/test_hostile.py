"""Whatever a text holds, `fit`'s data either is that text to the last character, or there is one line that says why not."""

import errno
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmlight.data import cache
from lmlight.data.loader import IGNORE_INDEX
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.errors import UserError
from lmlight.training.cli import main
from lmlight.training.datamodule import TextDataModule

TEXT = "River stone, lantern morning.\n" * 40
TRAINS = {
    "spaces alone": " " * 2000,
    "spaces and newlines": " \n  \n" * 500,
    "one character, again and again": "a" * 2000,
    "no spaces at all": "".join(chr(0x4E00 + n * 7 % 900) for n in range(3000)),
    "more characters than the vocabulary holds": "".join(chr(0x4E00 + n * n % 6007) for n in range(12000)),
    "one long line": "river stone lantern " * 5000,
    "one long word": "riverstone" * 5000,
    "right to left, marks that combine": "שָׁלוֹם עֲלֵיכֶם e\u0301\u0323 \u202eabc\u202c\n" * 60,
    "emoji with joiners": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽\n" * 150,
    "NUL bytes": "x" * 9000 + "river\0stone \0\n" * 60,
    "a few NUL bytes from the start on": "\0" + ("river stone " * 10 + "\0\n") * 30,
    "CRLF and lone CR": "river\r\nstone\rlantern\n\r" * 60,
    "a byte order mark": "\ufeff" + TEXT,
    "SentencePiece's own symbols": "▁a ▁ <s> </s> <unk> <0x0A> ▅ ⁇ <pad> \t▁\n" * 60,
    "nothing but space marks": "▁" * 1500,
    "nothing but the mark of unknowns": "▅▅ " * 500,
    "the last of Unicode": "\U0010ffff\ufffe\ufffd \x1c\x85\u2028\n" * 150,
}


def prepared(text, **settings):
    Path("text.txt").write_bytes(text.encode())
    data = TextDataModule("text.txt", **{"block_size": 16, "batch_size": 4} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.prepare_data()
        data.setup("fit")
    return data


def text_of(data):
    """The training text and the validation text, as the batches have them."""
    scored = [int(t) for batch in data.val_dataloader() for row in batch.targets for t in row if t != IGNORE_INDEX]
    assert len(list(data.train_dataloader())) > 0
    return data.tokenizer.decode(data.store.ids["train"][:].tolist()), data.tokenizer.decode(scored)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("name", TRAINS)
def test_unusual_text_round_trips(name, kind):
    text = TRAINS[name]
    if name == "nothing but space marks":
        with pytest.raises(UserError, match=r"nothing but.*--data\.tokenizer\.kind char"):
            prepared(text, tokenizer=TokenizerConfig(kind))
        kind = "char"
    data = prepared(text, tokenizer=TokenizerConfig(kind))
    cut = int(0.9 * len(text))
    assert text_of(data) == (text[:cut], text[cut:])


@settings(max_examples=20)
@given(st.lists(st.text(max_size=60) | st.sampled_from([" ", "\n", "\r\n", "▁", "<s>"]), max_size=12))
def test_any_unicode_round_trips(parts):
    text = TEXT + "".join(parts) + TEXT[:200] + "".join(parts[::-1])
    text = text.replace("\0", "")  # near the beginning, it is what binary files have
    cut = int(0.9 * len(text))
    assert text_of(prepared(text, tokenizer=TokenizerConfig(vocab_size=400))) == (text[:cut], text[cut:])


@settings(max_examples=20)
@given(st.lists(st.text(max_size=40), max_size=12))
def test_documents_of_any_unicode_round_trip(documents):
    documents = [TEXT, *(d.encode("utf-8", "replace").decode() for d in documents), TEXT[:300]]
    with Path("text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    data = TextDataModule("text.jsonl", block_size=16, batch_size=4, tokenizer=TokenizerConfig(vocab_size=400))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.prepare_data()
        data.setup("fit")
    ids = np.concatenate([data.store.ids["train"][:], data.val_ids[1:]])
    ends = np.flatnonzero(ids == data.tokenizer.eos_id)
    assert ends[-1] == len(ids) - 1
    found = [
        data.tokenizer.decode([i for i in part.tolist() if i != data.tokenizer.eos_id])
        for part in np.split(ids, ends[:-1])
    ]
    assert found == [document for document in documents if document]


def left_behind():
    return list(cache.cache_dir().glob("tokens/*/index.json")) if cache.cache_dir().is_dir() else []


def refused(capsys, *arguments):
    """The one line that `lmlight fit` says; no run and no store is left."""
    assert main(["fit", *arguments, "--data.block_size=16"]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("lmlight: warning:")]
    assert len(lines) == 1 and lines[0].startswith("lmlight: error: "), err
    assert not Path("runs").exists() and left_behind() == []
    return lines[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"a", "at least about"),
        (b"\n" * 2000, "nothing but newlines"),
        (b"\xff\xfeh\0i\0", "pass --data.encoding utf-16"),
        (TEXT.encode("utf-16-le"), "--data.encoding, such as utf-16-le"),
        (b"\x7fELF\2\1\1" + bytes(57) + TEXT.encode(), "looks binary"),
        (b"x" * 5000 + b"\xe9\n" + b"y" * 5000, "byte 0xe9 at offset 5,000"),
        (TEXT.encode()[:-1] + "é".encode()[:1], "byte 0xc3 at offset 1,199"),
    ],
)
def test_unusable_text_is_a_one_line_error(content, said, capsys):
    Path("text.txt").write_bytes(content)
    assert said in refused(capsys, "--data.corpus=text.txt")


def test_invalid_utf8_is_replaced_on_request():
    Path("text.txt").write_bytes(TEXT.encode() + b"caf\xe9 " + TEXT.encode())
    data = TextDataModule("text.txt", errors="replace", block_size=16, tokenizer=TokenizerConfig(vocab_size=300))
    data.prepare_data()
    data.setup("fit")
    assert "".join(text_of(data)) == TEXT + "caf\ufffd " + TEXT


def test_a_folder_with_no_text_gives_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "without text" in refused(capsys, "--data.corpus=empty")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_gives_one_line(capsys):
    Path("text.txt").write_text(TEXT)
    Path("text.txt").chmod(0)
    assert "permission" in refused(capsys, "--data.corpus=text.txt").lower()


def test_full_disk_is_a_one_line_error_and_leaves_no_store(capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("text.txt").write_text(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        message = refused(capsys, "--data.corpus=text.txt", "--data.tokenizer.vocab_size=300")
    assert os.strerror(errno.ENOSPC) in message and "LMLIGHT_CACHE" in message
    data = TextDataModule("text.txt", block_size=16, tokenizer=TokenizerConfig(vocab_size=300))
    data.prepare_data()
    data.setup("fit")
    assert "".join(text_of(data)) == TEXT


def test_unusable_cache_is_a_one_line_error(capsys, tmp_path):
    Path("text.txt").write_text(TEXT)
    Path("file").touch()
    message = refused(capsys, "--data.corpus=text.txt", "--data.cache=file", "--data.tokenizer.vocab_size=300")
    assert "--data.cache" in message


def test_unusable_validation_text_is_a_one_line_error(capsys):
    Path("text.txt").write_text(TEXT)
    Path("val.txt").write_bytes(b"\xff")
    assert "val.txt" in refused(
        capsys, "--data.corpus=text.txt", "--data.val_corpus=val.txt", "--data.tokenizer.vocab_size=300"
    )
