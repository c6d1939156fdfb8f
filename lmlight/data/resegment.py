"""Subword regularisation of a text that is more than one shard: an epoch goes from shard to shard, segmenting each afresh.

- The order of the shards, of the windows in each, and the segmentations are pure functions of (seed, epoch, shard).
- Shards are segmented ahead of their use, in processes of their own; how many there are changes nothing.

Free of torch, which those processes do not wait for.
"""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmlight.data.subword_regularization import SubwordSampler, SubwordSampling
from lmlight.data.token_store import TokenArray, decode, nameless_main, pool
from lmlight.data.tokenizer import Tokenizer, from_bytes
from lmlight.data.windows import epoch_starts, windows_per_epoch


class Resegmenter:
    """Fresh segmentations of the shards of a stream.

    Args:
        ids: the stream, of a store.
        tokenizer: its own; a unigram model.
        sampling: how segmentations are drawn.
        seed: of the run.
        processes: that segment ahead; 0 segments a shard when it is needed, in this process.

    Raises:
        UserError: see `SubwordSampler`.
    """

    def __init__(
        self, ids: TokenArray, tokenizer: Tokenizer, sampling: SubwordSampling, seed: int, processes: int
    ) -> None:
        self.ids, self._tokenizer, self._sampling = ids, tokenizer, sampling
        self._seed, self._processes = seed, processes
        self._sampler = SubwordSampler(tokenizer, "", sampling)
        self._pool: ProcessPoolExecutor | None = None
        self._coming: dict[tuple[int, int], Future[npt.NDArray[np.integer]]] = {}

    def get(self, epoch: int, shard: int, next_shards: list[int]) -> npt.NDArray[np.integer]:
        """The ids of a shard; the next ones are begun."""
        if not self._processes:
            return _segment(self._sampler, self.ids.shard(shard), self._seed, epoch, shard, self.ids.dtype)
        if self._pool is None:
            self._pool = pool(self._processes, _begin, self._tokenizer.to_bytes(), self._sampling, self._seed)
        wanted = [(epoch, number) for number in (shard, *next_shards[: self._processes])]
        for key in self._coming.keys() - wanted:  # of an epoch that was left
            self._coming.pop(key).cancel()
        for key in wanted:
            if key not in self._coming:
                part = self.ids.parts[key[1]]
                assert isinstance(part, Path)
                with nameless_main():
                    self._coming[key] = self._pool.submit(_segment_file, part, *key)
        return self._coming.pop((epoch, shard)).result()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool, self._coming = None, {}


class ShardedEpoch:
    """The windows of one epoch, in the order in which they are seen: shard by shard.

    Args:
        segments: gives the shards.
        block_size: T; a shard of no more than so many tokens is left out.
        seed: of the run.
        epoch: counted from 0.
    """

    def __init__(self, segments: Resegmenter, block_size: int, seed: int, epoch: int) -> None:
        self._segments, self._block_size, self._seed, self._epoch = segments, block_size, seed, epoch
        per_shard = windows_in_shards(segments.ids, block_size)
        order = np.random.default_rng((seed, epoch)).permutation(len(per_shard))
        self._order = [int(shard) for shard in order if per_shard[shard]]
        self._ends = np.cumsum(per_shard[self._order])
        self._slot = -1
        self._ids: npt.NDArray[np.integer]
        self._starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """(B, T + 1) ids of the windows at these positions of the epoch."""
        slots = np.searchsorted(self._ends, positions, side="right")
        rows = np.empty((len(positions), self._block_size + 1), self._segments.ids.dtype)
        for slot in np.unique(slots):
            self._turn_to(int(slot))
            begin = self._ends[slot - 1] if slot else 0
            starts = self._starts[positions[slots == slot] - begin]
            rows[slots == slot] = self._ids[starts[:, None] + np.arange(self._block_size + 1)]
        return rows

    def _turn_to(self, slot: int) -> None:
        if slot == self._slot:
            return
        shard = self._order[slot]
        self._ids = self._segments.get(self._epoch, shard, self._order[slot + 1 :])
        starts = epoch_starts(len(self._ids), self._block_size, self._seed, self._epoch, shard)
        # every epoch has as many windows, however long its segmentation is
        self._starts = np.resize(starts, int(np.diff(self._ends, prepend=0)[slot]))
        self._slot = slot


def windows_in_shards(ids: TokenArray, block_size: int) -> npt.NDArray[np.int64]:
    """How many windows of an epoch each shard has."""
    return np.array([windows_per_epoch(int(n), block_size) if n > block_size else 0 for n in ids.lengths])


def _segment(
    sampler: SubwordSampler, ids: npt.NDArray[np.integer], seed: int, epoch: int, shard: int, dtype: npt.DTypeLike
) -> npt.NDArray[np.integer]:
    return sampler.sample_shard(decode(sampler.tokenizer, ids), seed, epoch, shard).astype(dtype)


_here: tuple[SubwordSampler, int] | None = None  # of a process that segments


def _begin(tokenizer: bytes, sampling: SubwordSampling, seed: int) -> None:
    global _here
    _here = SubwordSampler(from_bytes(tokenizer), "", sampling), seed


def _segment_file(path: Path, epoch: int, shard: int) -> npt.NDArray[np.integer]:
    assert _here is not None
    sampler, seed = _here
    ids = np.load(path)
    return _segment(sampler, ids, seed, epoch, shard, ids.dtype)
