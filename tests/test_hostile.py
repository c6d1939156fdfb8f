"""Any text is either prepared without loss or refused with a one-line error."""

import errno
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmlight.data.loader import IGNORE_INDEX
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.errors import UserError
from lmlight.training.cli import main
from lmlight.training.datamodule import TextDataModule

TEXT = "River stone, lantern morning.\n" * 40
UNUSUAL = {
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


def prepared(name="text.txt", **settings):
    data = TextDataModule(
        name, **{"block_size": 16, "batch_size": 4, "tokenizer": TokenizerConfig(vocab_size=400)} | settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.prepare_data()
        data.setup("fit")
    return data


def text_of(data):
    """The training text and the validation text, decoded from the token ids."""
    scored = [int(t) for batch in data.val_dataloader() for row in batch.targets for t in row if t != IGNORE_INDEX]
    assert len(list(data.train_dataloader())) > 0
    return data.tokenizer.decode(data.store.ids["train"][:].tolist()), data.tokenizer.decode(scored)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_text_round_trips(name, kind):
    text = UNUSUAL[name]
    Path("text.txt").write_bytes(text.encode())
    if name == "nothing but space marks":
        with pytest.raises(UserError, match=r"nothing but.*--data\.tokenizer\.kind char"):
            prepared(tokenizer=TokenizerConfig(kind))
        kind = "char"
    data = prepared(tokenizer=TokenizerConfig(kind))
    cut = int(0.9 * len(text))
    assert text_of(data) == (text[:cut], text[cut:])


@settings(max_examples=20)
@given(st.lists(st.text(max_size=60) | st.sampled_from([" ", "\n", "\r\n", "▁", "<s>"]), max_size=12))
def test_any_unicode_round_trips(parts):
    text = TEXT + "".join(parts) + TEXT[:200] + "".join(parts[::-1])
    text = text.replace("\0", "")  # NUL bytes near the start make a file look binary
    Path("text.txt").write_bytes(text.encode())
    cut = int(0.9 * len(text))
    assert text_of(prepared()) == (text[:cut], text[cut:])


@settings(max_examples=20)
@given(st.lists(st.text(max_size=40), max_size=12))
def test_documents_of_any_unicode_round_trip(documents):
    documents = [TEXT, *(d.encode("utf-8", "replace").decode() for d in documents), TEXT[:300]]
    with Path("text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    data = prepared("text.jsonl")
    ids = np.concatenate([data.store.ids["train"][:], data.val_ids[1:]])
    ends = np.flatnonzero(ids == data.tokenizer.eos_id)
    assert ends[-1] == len(ids) - 1
    found = [
        data.tokenizer.decode([i for i in part.tolist() if i != data.tokenizer.eos_id])
        for part in np.split(ids, ends[:-1])
    ]
    assert found == [document for document in documents if document]


def error_of(capsys, *arguments):
    """Runs `lmlight fit` and returns its one-line error. It must leave no run and no store."""
    assert main(["fit", *arguments, "--data.block_size=16"]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("lmlight: warning:")]
    assert len(lines) == 1 and lines[0].startswith("lmlight: error: "), err
    assert not Path("runs").exists() and not list(Path("cache").glob("tokens/*/index.json"))
    return lines[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"a", "at least 1,000 characters"),
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
    assert said in error_of(capsys, "--data.corpus=text.txt")


def test_invalid_utf8_is_replaced_on_request():
    Path("text.txt").write_bytes(TEXT.encode() + b"caf\xe9 " + TEXT.encode())
    assert "".join(text_of(prepared(errors="replace"))) == TEXT + "caf\ufffd " + TEXT


def test_a_folder_with_no_text_gives_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no text" in error_of(capsys, "--data.corpus=empty")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_gives_one_line(capsys):
    Path("text.txt").write_text(TEXT)
    Path("text.txt").chmod(0)
    assert "permission" in error_of(capsys, "--data.corpus=text.txt").lower()


@pytest.mark.parametrize("error", [(errno.ENOSPC, os.strerror(errno.ENOSPC)), ("100 requested and 32 written",)])
def test_a_disk_that_fills_up_gives_one_line_and_leaves_no_store(capsys, monkeypatch, error):
    def full(*args, **options):
        raise OSError(*error)  # NumPy's has only a message

    Path("text.txt").write_text(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        message = error_of(capsys, "--data.corpus=text.txt", "--data.tokenizer.vocab_size=300")
    assert f"({error[-1]})" in message and "LMLIGHT_CACHE" in message
    assert "".join(text_of(prepared())) == TEXT


def test_unusable_cache_is_a_one_line_error(capsys):
    Path("text.txt").write_text(TEXT)
    Path("file").touch()
    message = error_of(capsys, "--data.corpus=text.txt", "--data.cache=file", "--data.tokenizer.vocab_size=300")
    assert "--data.cache" in message and "LMLIGHT_CACHE" in message


def test_unusable_validation_text_is_a_one_line_error(capsys):
    Path("text.txt").write_text(TEXT)
    Path("val.txt").write_bytes(b"\xff")
    assert "val.txt" in error_of(
        capsys, "--data.corpus=text.txt", "--data.val_corpus=val.txt", "--data.tokenizer.vocab_size=300"
    )
