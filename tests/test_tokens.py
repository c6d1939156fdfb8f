"""A token store is whole or absent; windows are what plain slicing gives."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lmlight.data.corpus import Piece
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.data.tokens import UNSCORED, TokenStore, Windows, as_batch
from lmlight.errors import UserError

ABC = CharTokenizer("abc\n")
TEXTS = {"train": [Piece("abcabc\ncab" * 3)], "val": [Piece("cab")]}


@pytest.fixture
def folder(tmp_path):
    """A store's place, with the store of `TEXTS` in it under the fingerprint `print`."""
    folder = tmp_path / "tokens" / "store"
    TokenStore.write(folder, "print", TEXTS, ABC)
    return folder


# The store


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_a_store_gives_back_ids_characters_and_tokenizer(tmp_path, verse, kind):
    tokenizer = TokenizerConfig(kind, 400).train(verse)
    texts = {"train": verse[:4000], "val": verse[4000:]}
    pieces = {split: [Piece(text)] for split, text in texts.items()}
    TokenStore.write(tmp_path / "deep" / "down" / "store", "print", pieces, tokenizer)
    store = TokenStore(tmp_path / "deep" / "down" / "store", "print")
    assert {split: ids.tolist() for split, ids in store.ids.items()} == {
        split: tokenizer.encode(text) for split, text in texts.items()
    }
    assert store.chars == {split: len(text) for split, text in texts.items()}
    assert store.tokenizer.fingerprint == tokenizer.fingerprint
    assert {ids.dtype for ids in store.ids.values()} == {np.dtype(np.uint16)}
    assert all(isinstance(ids, np.memmap) for ids in store.ids.values())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_largest_id_fits_its_type(tmp_path, vocab_size, dtype):
    tokenizer = CharTokenizer(chr(0x10000 + index) for index in range(vocab_size))
    TokenStore.write(tmp_path / "store", "print", {"train": [Piece(tokenizer.decode([0, vocab_size - 1]))]}, tokenizer)
    ids = TokenStore(tmp_path / "store", "print").ids["train"]
    assert ids.tolist() == [0, vocab_size - 1]
    assert ids.dtype == dtype


def test_another_fingerprint_is_refused(folder):
    with pytest.raises(UserError, match="another text or tokenizer") as caught:
        TokenStore(folder, "another print")
    assert str(folder) in str(caught.value)


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_its_head(path):
    path.write_bytes(path.read_bytes()[:20])


def garble(path):
    path.write_bytes(b"\x01\x02 garbage")


def empty(path):
    path.write_bytes(b"")


def replace_by_another_json(path):
    path.write_text("[]")


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        *(
            (damage, name)
            for name in ("index.json", "train.npy", "val.npy", "tokenizer")
            for damage in (remove, garble)
        ),
        *((damage, name) for name in ("index.json", "train.npy", "tokenizer") for damage in (cut, cut_to_its_head)),
        (empty, "index.json"),
        (empty, "train.npy"),
        (empty, "tokenizer"),
        (replace_by_another_json, "index.json"),
    ],
)
def test_a_damaged_store_is_refused_with_what_to_do(folder, damage, name):
    damage(folder / name)
    with pytest.raises(UserError, match="delete that folder") as caught:
        TokenStore(folder, "print")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="delete that folder"):
        TokenStore(tmp_path / "absent", "print")


def test_where_another_was_first_its_store_stays(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    TokenStore.write(folder, "other", {"train": [Piece("a")]}, CharTokenizer("a"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["store"]


def test_a_folder_with_something_else_in_it_is_not_overwritten(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match="store"):
        TokenStore.write(tmp_path / "store", "print", TEXTS, ABC)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["thesis.txt"]


class Failing(CharTokenizer):
    def encode(self, text):
        if text == "cab":
            raise UserError("no such character")
        return super().encode(text)


class Forgetful(CharTokenizer):
    def encode(self, text):
        return super().encode(text)[1:]


@pytest.mark.parametrize(("tokenizer", "error"), [(Failing, UserError), (Forgetful, RuntimeError)])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, tokenizer, error):
    with pytest.raises(error):
        TokenStore.write(tmp_path / "tokens" / "store", "print", TEXTS, tokenizer("abc\n"))
    assert list((tmp_path / "tokens").iterdir()) == []


def test_the_index_can_be_read_without_lmlight(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index == {"fingerprint": "print", "chars": {"train": 30, "val": 3}, "about": {}}


# Windows

IDS = np.array([5, 3, 8, 1, 9, 2, 7, 0, 4, 6, 3, 3, 5], dtype=np.uint16)
COUNTS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
STARTS = np.array([0, 8, 3, 7])


def test_a_batch_is_what_plain_slicing_gives():
    ids, counts = IDS.tolist(), COUNTS.tolist()
    batch = Windows(IDS, STARTS, 4, COUNTS).__getitems__([2, 0, 1])
    assert batch.inputs.tolist() == [ids[s : s + 4] for s in (3, 0, 8)]
    assert batch.targets.tolist() == [ids[s + 1 : s + 5] for s in (3, 0, 8)]
    assert batch.target_chars.tolist() == [[counts[i] for i in ids[s + 1 : s + 5]] for s in (3, 0, 8)]
    assert (batch.inputs.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert batch.target_chars.dtype == torch.int64


def test_one_window_is_a_batch_of_one():
    windows = Windows(IDS, STARTS, 4, COUNTS)
    assert len(windows) == 4
    assert windows[1].inputs.tolist() == [IDS[8:12].tolist()]


def test_context_is_neither_a_target_nor_counted():
    batch = Windows(IDS, STARTS, 4, COUNTS, scored_from=np.array([0, 1, 2, 4])).__getitems__([0, 1, 2, 3])
    expected = [IDS[s + 1 : s + 5].tolist() for s in STARTS]
    chars = [[COUNTS[i].item() for i in row] for row in expected]
    for row, context in enumerate([0, 1, 2, 4]):
        expected[row][:context] = [UNSCORED] * context
        chars[row][:context] = [0] * context
    assert batch.targets.tolist() == expected
    assert batch.target_chars.tolist() == chars
    assert batch.inputs.tolist() == [IDS[s : s + 4].tolist() for s in STARTS]
    assert batch.targets.dtype == torch.int64


def test_unscored_is_what_cross_entropy_passes_over():
    targets = Windows(IDS, STARTS, 4, COUNTS, scored_from=np.array([3, 3, 3, 3]))[0].targets[0]
    losses = torch.nn.functional.cross_entropy(torch.randn(4, 10), targets, reduction="none")
    assert (losses != 0).tolist() == [False, False, False, True]


def test_windows_may_have_their_own_lengths():
    windows = Windows(IDS, np.array([0, 4, 8]), np.array([4, 4, 2]), COUNTS)
    assert windows[2].targets.tolist() == [IDS[9:11].tolist()]
    assert windows.__getitems__([0, 1]).inputs.shape == (2, 4)


def test_counts_that_are_no_whole_numbers_stay_so():
    assert Windows(IDS, STARTS, 4, COUNTS / 4)[0].target_chars.tolist() == [[1.0, 2.25, 0.5, 2.5]]


def test_loader_processes_change_nothing(folder):
    ids = TokenStore(folder, "print").ids["train"]  # memory-mapped: opened again in each process
    windows = Windows(ids, np.arange(0, 24, 4), 4, ABC.char_counts)
    batches = [[5, 0], [1, 4], [3, 2]]
    alone, together = (
        [
            [part.tolist() for part in batch]
            for batch in DataLoader(windows, batch_sampler=batches, collate_fn=as_batch, num_workers=n)
        ]
        for n in (0, 2)
    )
    assert alone == together
    assert alone[0][0] == [ids[20:24].tolist(), ids[0:4].tolist()]
