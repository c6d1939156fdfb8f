"""Batches equal plain slices of the ids, and depend on seed and epoch only."""

import itertools
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmlight.data import loader as loaders
from lmlight.data.loader import IGNORE_INDEX, EvalLoader, StatefulTrainLoader, make_batch
from lmlight.data.reading import TextChunk
from lmlight.data.token_store import TokenArray, TokenStore
from lmlight.data.token_writer import write_store
from lmlight.data.tokenizer import CharTokenizer
from lmlight.data.windows import TrainBatchSampler, WindowSource, epoch_starts, random_starts, stored_windows

ABC = CharTokenizer("abc\n")
IDS = np.array([5, 3, 8, 1, 9, 2, 7, 0, 4, 6, 3, 3, 5], dtype=np.uint16)
ARRAY = TokenArray([IDS[:6], IDS[6:]], [6, 7], IDS.dtype)
COUNTS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])


def lists(batches):
    return [[tensor.tolist() for tensor in batch] for batch in batches]


def test_batch_equals_plain_slicing():
    ids, counts = IDS.tolist(), COUNTS.tolist()
    batch = make_batch(np.stack([IDS[start : start + 5] for start in (3, 0, 8)]), COUNTS)
    assert batch.inputs.tolist() == [ids[s : s + 4] for s in (3, 0, 8)]
    assert batch.targets.tolist() == [ids[s + 1 : s + 5] for s in (3, 0, 8)]
    assert batch.target_chars.tolist() == [[counts[i] for i in ids[s + 1 : s + 5]] for s in (3, 0, 8)]
    assert {tensor.dtype for tensor in batch} == {torch.int64}
    assert make_batch(IDS[None, :3], COUNTS / 4).target_chars.tolist() == [[1.0, 2.25]]


# Evaluation


def test_context_is_neither_a_target_nor_counted():
    starts, contexts = [0, 8, 3, 7], [0, 1, 2, 4]
    windows = np.array([[start, 4, context] for start, context in zip(starts, contexts)])
    (batch,) = EvalLoader(ARRAY, windows, COUNTS, batch_size=4)
    targets = [IDS[s + 1 : s + 5].tolist() for s in starts]
    chars = [[COUNTS[i].item() for i in row] for row in targets]
    for row, context in enumerate(contexts):
        targets[row][:context] = [IGNORE_INDEX] * context
        chars[row][:context] = [0] * context
    assert batch.targets.tolist() == targets
    assert batch.target_chars.tolist() == chars
    assert batch.inputs.tolist() == [IDS[s : s + 4].tolist() for s in starts]
    assert batch.targets.dtype == torch.int64


def test_cross_entropy_ignores_context():
    (batch,) = EvalLoader(ARRAY, np.array([[0, 4, 3]]), COUNTS, batch_size=1)
    losses = torch.nn.functional.cross_entropy(torch.randn(4, 10), batch.targets[0], reduction="none")
    assert (losses != 0).tolist() == [False, False, False, True]


def test_shorter_last_window_is_a_batch_by_itself():
    batches = list(EvalLoader(ARRAY, np.array([[0, 4, 0], [4, 4, 0], [8, 2, 0]]), COUNTS, batch_size=3))
    assert [tuple(batch.inputs.shape) for batch in batches] == [(2, 4), (1, 2)]
    assert batches[1].targets.tolist() == [IDS[9:11].tolist()]


@given(st.integers(1, 60), st.booleans(), st.integers(1, 9), st.integers(1, 5))
def test_ranks_together_evaluate_every_window_once(full, shorter, batch_size, world_size):
    windows = np.array([[4 * n, 4, 0] for n in range(full)] + [[4 * full, 2, 0]] * shorter)
    ids = TokenArray([np.arange(4 * len(windows) + 1)], [4 * len(windows) + 1], np.int64)
    ranks = [list(EvalLoader(ids, windows, np.ones(300), batch_size, rank, world_size)) for rank in range(world_size)]
    batches = [batch.targets for rank in ranks for batch in rank]
    assert {len(rank) for rank in ranks} == {-(-len(batches) // world_size)}
    scored = sorted(target for batch in batches for target in batch.flatten().tolist() if target != IGNORE_INDEX)
    assert scored == list(range(1, 4 * full + 2 * shorter + 1))
    assert all(len(batch) <= batch_size if batch.shape[1] == 4 else len(batch) == 1 for batch in batches)
    assert sum(bool((batch == IGNORE_INDEX).all()) for batch in batches) < world_size, "unnecessary padding windows"


# Training


def test_worker_processes_change_nothing(tmp_path):
    write_store(tmp_path, "print", {"train": [TextChunk("abcabc\ncab" * 3)]}, ABC)
    store = TokenStore(tmp_path, "print")
    ids = store.ids["train"]  # memory-mapped: opened again in each process
    alone, together = (
        lists(StatefulTrainLoader(store, stored_windows(ids, 4, 0, "epoch", n), TrainBatchSampler(5, 2)))
        for n in (0, 2)
    )
    assert alone == together
    starts = epoch_starts(30, 4, np.random.default_rng((0, 0)))
    assert alone[0][0] == [ids[start : start + 4].tolist() for start in starts[:2]]


class Interrupted:
    """A source in whose processes Ctrl-C arrives."""

    num_workers = 1

    def __len__(self):
        return 5

    def rows(self, epoch, positions):
        signal.raise_signal(signal.SIGINT)
        return np.zeros((len(positions), 3), np.int64)


def test_worker_processes_leave_ctrl_c_to_the_parent():
    store = SimpleNamespace(char_counts={"train": COUNTS}, train_fingerprint="print")
    assert len(list(StatefulTrainLoader(store, Interrupted(), TrainBatchSampler(5, 1)))) == 5


def in_memory(shards, ahead=1, order="epoch", seed=0):
    """A source of shards that are a list of arrays, and the list of what it requests."""
    requests = []

    def load(epoch, shard):
        requests.append((epoch, shard))
        return shards[shard]

    return WindowSource(load, list(map(len, shards)), 5, seed, order, ThreadPoolExecutor(1), ahead), requests


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(("order", "starts"), [("epoch", epoch_starts), ("random", random_starts)])
def test_sharded_windows_visit_shards_one_by_one(seed, epoch, order, starts):
    shards = [np.arange(100 * shard, 100 * shard + n) for shard, n in enumerate((60, 90, 4, 45, 60))]
    source, requests = in_memory(shards, order=order, seed=seed)
    rows = np.concatenate([source.rows(epoch, at) for at in np.array_split(np.arange(len(source)), 9)])
    assert (np.diff(rows) == 1).all()
    seen = {}  # starts of the windows of each shard, in order
    for start in rows[:, 0].tolist():
        seen.setdefault(start // 100, []).append(start % 100)
    assert len(rows) == sum(map(len, seen.values()))
    assert list(seen) == [s for s in np.random.default_rng((seed, epoch)).permutation(5).tolist() if s != 2]
    assert seen == {
        shard: starts(len(shards[shard]), 5, np.random.default_rng((seed, epoch, shard))).tolist() for shard in seen
    }
    assert seen[0] != seen[4], "two shards of the same length have the same order"
    assert requests[: len(seen)] == [(epoch, shard) for shard in seen], "a shard was requested twice"
    assert source.rows(epoch, np.array([0])).tolist() == rows[:1].tolist(), "positions may go back"


def test_single_shard_has_the_order_of_unsharded_windows():
    ids = np.arange(100)
    (sharded, _), whole = in_memory([ids], seed=3), stored_windows(TokenArray([ids], [100], ids.dtype), 5, 3, "epoch")
    positions = np.arange(len(whole))
    assert len(sharded) == len(whole)
    assert sharded.rows(1, positions).tolist() == whole.rows(1, positions).tolist()


def test_shards_of_the_next_epochs_are_loaded_ahead():
    source, requests = in_memory([np.arange(100)], ahead=2)
    for epoch in range(2):
        source.rows(epoch, np.array([0]))
    source.close()
    assert requests[:2] == [(0, 0), (1, 0)] and set(requests) <= {(epoch, 0) for epoch in range(4)}


def test_changed_length_of_a_shard_leaves_the_epoch_its_number_of_windows():
    shards = [np.arange(100), np.arange(100)]
    source, _ = in_memory(shards)
    shards[:] = np.arange(80), np.arange(130)
    assert source.rows(0, np.arange(len(source))).shape == (len(source), 6)


def test_shard_that_becomes_shorter_than_a_block_is_repeated():
    shards = [np.arange(6)]
    source, _ = in_memory(shards)
    shards[:] = [np.arange(4)]
    assert source.rows(0, np.array([0])).tolist() == [[0, 1, 2, 3, 0, 1]]


@pytest.mark.parametrize(("limit", "epochs"), [(1.0, [0, 0]), (2, [0, 1]), (0.4, [0, 1])])
def test_resume_after_an_epoch_that_was_limited_begins_the_next(limit, epochs):
    """Five batches in an epoch, of which `limit_train_batches` uses two."""
    loader = train_loader(1, limit=limit)
    list(itertools.islice(loader, 2))
    state = loader.state_dict()
    again = train_loader(1, limit=limit)
    again.load_state_dict(state)
    next(iter(again))
    assert [state["epoch"], again.state_dict()["epoch"]] == epochs


def test_first_epoch_can_be_repeated():
    """For `overfit_batches`."""
    once, repeated = train_loader(1), train_loader(1, repeat=True)
    first, second = lists(once), lists(once)
    assert first != second
    assert [lists(repeated), lists(repeated)] == [first, first]


def test_block_longer_than_every_shard_is_refused():
    with pytest.raises(loaders.UserError, match="longer than data.block_size 5"):
        in_memory([np.arange(5)])


@pytest.fixture
def _without_gpu(monkeypatch):
    """Lets the GPU code path run on a CPU, without pinned memory."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    dataloader = loaders.DataLoader
    monkeypatch.setattr(
        loaders, "DataLoader", lambda *args, **options: dataloader(*args, **options | {"pin_memory": False})
    )


def train_loader(batch_size, device=None, **options):
    store = SimpleNamespace(char_counts={"train": COUNTS}, train_fingerprint="print")
    windows, sampler = stored_windows(ARRAY, 2, 0, "epoch"), TrainBatchSampler(5, batch_size)
    return StatefulTrainLoader(store, windows, sampler, device, **options)


def test_gpu_batches_are_pinned(monkeypatch):
    options = {}
    monkeypatch.setattr(loaders, "DataLoader", lambda *_, **given: options.update(given) or [])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for device, pinned in ((torch.device("cuda", 0), True), (None, False)):
        assert list(train_loader(2, device)) == []
        assert options["pin_memory"] is pinned


@pytest.mark.usefixtures("_without_gpu")
def test_prefetching_gives_the_same_batches_and_counts_only_those_returned():
    plain, ahead = train_loader(1), train_loader(1, torch.device("cuda", 0))
    for _ in range(2):
        assert lists(plain) == lists(ahead)
    batches = iter(ahead)
    for seen in range(1, 4):
        next(batches)
        assert ahead.state_dict()["windows"] == seen
    resumed = train_loader(1, torch.device("cuda", 0))
    resumed.load_state_dict(ahead.state_dict())
    assert lists(resumed) == lists(batches)


@pytest.mark.usefixtures("_without_gpu")
def test_next_batch_is_fetched_while_one_is_in_use():
    fetched, threads = threading.Semaphore(0), set()

    def batches():
        for number in range(3):
            threads.add(threading.current_thread())
            yield number
            fetched.release()

    device = torch.device("cuda", 0)
    coming = loaders.prefetch(batches(), device)
    assert next(coming) == 0
    assert fetched.acquire(timeout=10), "the next batch was not requested"
    assert list(coming) == [1, 2]
    assert threading.current_thread() not in threads

    def failing():
        yield 0
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(loaders.prefetch(failing(), device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_in_pinned_memory():
    loader = train_loader(1, torch.device("cuda", 0))
    assert all(tensor.is_pinned() for batch in loader for tensor in batch)
