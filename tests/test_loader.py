"""Windows are what plain slicing gives, wherever the ids are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lmlight.data.loader import IGNORE_INDEX, ShardedWindows, Windows, identity_collate
from lmlight.data.reading import TextChunk
from lmlight.data.resegment import ShardedEpoch
from lmlight.data.token_store import TokenArray, TokenStore
from lmlight.data.tokenizer import CharTokenizer
from lmlight.data.windows import epoch_starts

ABC = CharTokenizer("abc\n")

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


class Rows:
    """As much of a `ShardedEpoch` as a batch asks for."""

    def rows(self, positions):
        return IDS[STARTS[positions, None] + np.arange(5)]


def test_a_batch_of_a_sharded_epoch_is_one_too():
    for got, expected in zip(
        ShardedWindows(Rows(), COUNTS).__getitems__([2, 0, 1]), Windows(IDS, STARTS, 4, COUNTS).__getitems__([2, 0, 1])
    ):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_sharded_epoch_sees_each_shard_s_windows_in_an_order_of_its_own(seed, epoch):
    parts = [np.arange(100 * shard, 100 * shard + n) for shard, n in enumerate((60, 90, 4, 45, 60))]
    segments = SimpleNamespace(
        ids=TokenArray(parts, list(map(len, parts)), np.int64), get=lambda epoch, shard, next_shards: parts[shard]
    )
    sharded = ShardedEpoch(segments, 5, seed, epoch)
    rows = np.concatenate([sharded.rows(at) for at in np.array_split(np.arange(len(sharded)), 9)])
    assert (np.diff(rows) == 1).all()
    seen = {}  # shards in the order in which they are met, each with where its windows start
    for start in rows[:, 0].tolist():
        seen.setdefault(start // 100, []).append(start % 100)
    assert len(rows) == sum(map(len, seen.values()))
    assert list(seen) == [s for s in np.random.default_rng((seed, epoch)).permutation(5).tolist() if s != 2]
    assert seen == {shard: epoch_starts(len(parts[shard]), 5, seed, epoch, shard).tolist() for shard in seen}
    assert seen[0] != seen[4], "as long, and yet in another order"


def test_one_window_is_a_batch_of_one():
    windows = Windows(IDS, STARTS, 4, COUNTS)
    assert len(windows) == 4
    assert windows[1].inputs.tolist() == [IDS[8:12].tolist()]


def test_context_is_neither_a_target_nor_counted():
    batch = Windows(IDS, STARTS, 4, COUNTS, scored_from=np.array([0, 1, 2, 4])).__getitems__([0, 1, 2, 3])
    expected = [IDS[s + 1 : s + 5].tolist() for s in STARTS]
    chars = [[COUNTS[i].item() for i in row] for row in expected]
    for row, context in enumerate([0, 1, 2, 4]):
        expected[row][:context] = [IGNORE_INDEX] * context
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


def test_loader_processes_change_nothing(tmp_path):
    TokenStore.write(tmp_path, "print", {"train": [TextChunk("abcabc\ncab" * 3)]}, ABC)
    ids = TokenStore(tmp_path, "print").ids["train"]  # memory-mapped: opened again in each process
    windows = Windows(ids, np.arange(0, 24, 4), 4, ABC.char_counts)
    batches = [[5, 0], [1, 4], [3, 2]]
    alone, together = (
        [
            [part.tolist() for part in batch]
            for batch in DataLoader(windows, batch_sampler=batches, collate_fn=identity_collate, num_workers=n)
        ]
        for n in (0, 2)
    )
    assert alone == together
    assert alone[0][0] == [ids[20:24].tolist(), ids[0:4].tolist()]
