"""The order of windows: properties for any size, seed and number of processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmlight.data import windows as orders
from lmlight.data.windows import TrainBatchSampler, eval_windows, subset_windows, windows_per_epoch
from lmlight.errors import UserError


def epoch_starts(n_tokens, block_size, seed, epoch):
    return orders.epoch_starts(n_tokens, block_size, np.random.default_rng((seed, epoch)))


def random_starts(n_tokens, block_size, seed, epoch):
    return orders.random_starts(n_tokens, block_size, np.random.default_rng((seed, epoch)))


blocks = st.integers(1, 40)
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 1000)
# (n_tokens, block_size): from the shortest text that holds one window
sizes = blocks.flatmap(lambda block: st.tuples(st.integers(block + 1, 600), st.just(block)))


@given(sizes, seeds, epochs)
def test_epoch_windows_are_a_permutation_of_a_grid(size, seed, epoch):
    n_tokens, block = size
    starts = epoch_starts(n_tokens, block, seed, epoch)
    first, n_windows = min(starts), windows_per_epoch(n_tokens, block)
    assert sorted(starts) == [first + block * i for i in range(n_windows)]
    assert first >= 0 and max(starts) + block < n_tokens
    assert (n_tokens - 1) - block * n_windows < 2 * block, "omits less than two blocks"


def test_order_matches_recorded_values():
    """Other values would break resume."""
    assert epoch_starts(50, 5, seed=1, epoch=0).tolist() == [29, 4, 9, 24, 14, 39, 34, 19]
    assert epoch_starts(50, 5, seed=1, epoch=1).tolist() == [40, 35, 10, 25, 5, 20, 15, 30]
    assert random_starts(50, 5, seed=1, epoch=0).tolist() == [21, 23, 33, 42, 1, 6, 37, 42]


def test_offsets_and_orders_vary_by_epoch_and_seed():
    runs = [epoch_starts(1000, 10, seed, epoch) for seed in (0, 1) for epoch in range(50)]
    assert len({tuple(starts) for starts in runs}) == len(runs)
    # every possible offset occurs
    offsets = {min(epoch_starts(45, 10, 7, epoch)) for epoch in range(300)}
    assert offsets == set(range(45 - 10 * windows_per_epoch(45, 10)))


@given(sizes, seeds, epochs)
def test_random_windows_are_in_range(size, seed, epoch):
    n_tokens, block = size
    starts = random_starts(n_tokens, block, seed, epoch)
    assert len(starts) == windows_per_epoch(n_tokens, block)
    assert min(starts) >= 0
    assert max(starts) + block < n_tokens


def test_random_windows_reach_both_ends():
    met = {start for epoch in range(100) for start in random_starts(12, 3, 0, epoch)}
    assert met == set(range(12 - 3))


# Evaluation


def scored_targets(windows):
    return [start + position for start, length, scored_from in windows for position in range(scored_from, length)]


@given(st.integers(2, 400), blocks, st.data())
def test_every_target_is_scored_exactly_once_in_order(n_tokens, block, data):
    stride = data.draw(st.integers(1, block))
    windows = eval_windows(n_tokens, block, stride)
    assert scored_targets(windows) == list(range(n_tokens - 1))
    assert {length for _, length, _ in windows[:-1]} <= {block}, "only the last window is shorter"
    for start, length, scored_from in windows:
        assert start >= 0
        assert 0 <= scored_from < length <= block
        assert start + length <= n_tokens - 1


@given(st.integers(2, 400), blocks)
def test_strides_of_a_block_and_half_a_block(n_tokens, block):
    """The first scored position of every later window has exactly block // 2 inputs to its left."""
    first, *others = map(tuple, eval_windows(n_tokens, block, stride=-(-block // 2)))
    assert first == (0, min(block, n_tokens - 1), 0)
    assert {scored_from for _, _, scored_from in others} <= {block // 2}
    plain = eval_windows(n_tokens, block, stride=block)
    assert [(start, scored_from) for start, _, scored_from in plain] == [(s, 0) for s in range(0, n_tokens - 1, block)]


@pytest.mark.parametrize(("world_size", "accumulate"), [(3, 1), (1, 3), (4, 4), (1, 0)])
def test_indivisible_batch_is_refused(world_size, accumulate):
    with pytest.raises(
        UserError, match=r"data\.batch_size 8.*multiple of \d processes|accumulate_grad_batches"
    ) as caught:
        TrainBatchSampler(100, 8, 0, world_size, accumulate)
    assert "\n" not in str(caught.value)


def test_subset_windows_are_whole_distinct_and_evenly_spaced():
    starts, lengths, scored_from = subset_windows(n_tokens=1000, block_size=16, windows=7).T
    assert set(lengths) == {16} and set(scored_from) == {0}
    assert starts[0] == 0 and starts[-1] > 1000 - 3 * 16
    assert set(np.diff(starts) // 16) <= {10, 11}
    assert len(subset_windows(1000, 16, 10_000)) == 999 // 16


# Batches

shares = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # world_size, accumulate, micro-batch


def steps_of(n_windows, world_size, accumulate, micro):
    """The windows of each optimizer step, over its micro-batches and ranks."""
    batch_size = micro * world_size * accumulate
    ranks = [
        list(TrainBatchSampler(n_windows, batch_size, rank, world_size, accumulate).batches())
        for rank in range(world_size)
    ]
    n_steps = len(ranks[0]) // accumulate
    return [
        [
            position
            for micro_batch in range(step * accumulate, (step + 1) * accumulate)
            for rank in ranks
            for position in rank[micro_batch]
        ]
        for step in range(n_steps)
    ]


@given(shares, st.integers(0, 200))
def test_step_is_a_slice_of_the_global_order_for_any_number_of_processes(share, more):
    world_size, accumulate, micro = share
    batch = micro * world_size * accumulate
    n_windows = batch + more
    steps = steps_of(n_windows, *share)
    assert steps == [list(range(s * batch, (s + 1) * batch)) for s in range(n_windows // batch)]


@given(shares, st.integers(1, 200))
def test_micro_batches_have_the_same_size_and_len_counts_them(share, n_windows):
    world_size, accumulate, micro = share
    for rank in range(world_size):
        order = TrainBatchSampler(n_windows, micro * world_size * accumulate, rank, world_size, accumulate)
        batches = list(order.batches())
        assert len(order) == len(batches) > 0
        assert {len(batch) for batch in batches} == {micro}
        assert len(batches) % accumulate == 0


@given(shares, st.data())
def test_epoch_shorter_than_a_batch_is_repeated(share, data):
    world_size, accumulate, micro = share
    batch = micro * world_size * accumulate
    n_windows = data.draw(st.integers(1, batch))
    assert steps_of(n_windows, *share) == [[position % n_windows for position in range(batch)]]


def test_batches_can_be_iterated_twice():
    order = TrainBatchSampler(n_windows=10, batch_size=4, rank=1, world_size=2)
    assert list(order.batches()) == list(order.batches()) == [[2, 3], [6, 7]]
