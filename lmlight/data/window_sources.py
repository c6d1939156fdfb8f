"""Where training windows come from, behind one class, `WindowSource`.

- A text whose tokens do not change is one shard, in memory or memory-mapped (`stored_windows`).
- Ids that are made or fetched shortly before use come in several: `resegmented_windows` samples the segmentation of every
  shard anew in every epoch, `streaming.streamed_windows` reads object storage.

Axes: B windows, T positions, N tokens. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from lmlight.data.reading import TextChunk
from lmlight.data.subword_regularization import SubwordSampler, SubwordSampling
from lmlight.data.token_store import TokenArray, Tokens
from lmlight.data.tokenizer import SentencePieceTokenizer, Tokenizer
from lmlight.data.windows import ORDERS, windows_per_epoch
from lmlight.data.workers import process_pool
from lmlight.errors import UserError


class WindowSource:
    """Training windows, in an order that is a pure function of (seed, epoch, position).

    All windows of one shard are visited, then all of the next, in an order of the epoch's own.

    Args:
        load: returns the ids (N,) of a shard, given the epoch and the shard's number.
        lengths: tokens in each shard. Shards of at most `block_size` tokens are left out.
        block_size: T.
        seed: the run's seed.
        order: `epoch` or `random`, see `windows`.
        pool: loads shards in the background; None loads each when it is needed.
        ahead: number of shards that `pool` loads before they are needed.
        num_workers: DataLoader processes that gather windows.

    Raises:
        UserError: no shard is longer than `block_size`.
    """

    def __init__(
        self,
        load: Callable[[int, int], TokenArray | Tokens],
        lengths: Sequence[int],
        block_size: int,
        seed: int,
        order: str,
        pool: Executor | None = None,
        ahead: int = 0,
        num_workers: int = 0,
    ) -> None:
        self._load, self._block_size, self._seed, self._starts_of = load, block_size, seed, ORDERS[order]
        self._per_shard = np.array([windows_per_epoch(n, block_size) if n > block_size else 0 for n in lengths])
        if not len(self):
            raise UserError(f"no shard of the training text is longer than data.block_size {block_size}: lower it")
        self._pool, self._ahead, self.num_workers = pool, ahead, num_workers
        self._requested: dict[tuple[int, int], Future[TokenArray | Tokens]] = {}
        self._loaded: tuple[int, int] | None = None  # epoch and shard

    def __len__(self) -> int:
        """Windows per epoch; the same for every epoch."""
        return int(self._per_shard.sum())

    def rows(self, epoch: int, positions: npt.NDArray[np.int64]) -> Tokens:
        """(B, T + 1) ids of the windows at `positions` of the epoch."""
        shards = np.random.default_rng((self._seed, epoch)).permutation(len(self._per_shard))
        shards = shards[self._per_shard[shards] > 0]
        ends = np.cumsum(self._per_shard[shards])
        slots = np.searchsorted(ends, positions, side="right")
        rows = np.empty((len(positions), self._block_size + 1), np.int64)
        for slot in np.unique(slots):
            self._open([(epoch, int(shard)) for shard in shards[slot : slot + 1 + self._ahead]])
            here = slots == slot
            starts = self._starts[positions[here] - ends[slot]]  # negative: from the shard's last window
            rows[here] = self._ids[starts[:, None] + np.arange(self._block_size + 1)]
        return rows

    def close(self) -> None:
        """Stops processes and threads that work ahead."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _open(self, wanted: list[tuple[int, int]]) -> None:
        """Loads the first of the wanted shards and requests the others."""
        if wanted[0] == self._loaded:
            return
        epoch, shard = wanted[0]
        if self._pool is None:
            self._ids = self._load(epoch, shard)
        else:
            for key in self._requested.keys() - wanted:  # of an epoch that was left early
                self._requested.pop(key).cancel()
            for key in wanted:
                if key not in self._requested:
                    self._requested[key] = self._pool.submit(self._load, *key)
            self._ids = self._requested.pop(wanted[0]).result()
        number = shard if len(self._per_shard) > 1 else None
        starts = self._starts_of(len(self._ids), self._block_size, self._seed, epoch, number)
        self._starts = np.resize(starts, self._per_shard[shard])  # segmentations vary in length, epochs do not
        self._loaded = wanted[0]


def stored_windows(ids: TokenArray, block_size: int, seed: int, order: str, num_workers: int = 0) -> WindowSource:
    """Windows of the ids as they are stored."""
    return WindowSource(partial(_stored, ids), [len(ids)], block_size, seed, order, num_workers=num_workers)


def _stored(ids: TokenArray, epoch: int, shard: int) -> TokenArray:
    return ids


def resegmented_windows(
    ids: TokenArray,
    tokenizer: Tokenizer,
    sampling: SubwordSampling,
    processes: int,
    block_size: int,
    seed: int,
    order: str,
) -> WindowSource:
    """Subword regularization: every epoch segments every shard anew, as a pure function of (seed, epoch, shard).

    Args:
        ids: the stored training ids.
        tokenizer: the store's tokenizer, a unigram model.
        sampling: how to sample.
        processes: worker processes, each of which segments one shard ahead of use. 0 segments in this process.
        block_size, seed, order: see `WindowSource`.

    Raises:
        UserError: see `SubwordSampler`.
    """
    SubwordSampler(tokenizer, sampling)
    load = partial(_segment, ids, tokenizer.to_bytes(), sampling, seed)
    pool = process_pool(processes) if processes else None
    return WindowSource(load, ids.lengths, block_size, seed, order, pool, processes)


def _segment(ids: TokenArray, tokenizer: bytes, sampling: SubwordSampling, seed: int, epoch: int, shard: int) -> Tokens:
    sampler = _sampler(tokenizer, sampling)
    number = shard if len(ids.shards) > 1 else None
    return sampler.sample(_decode_chunks(sampler.tokenizer, ids.shard(shard)), seed, epoch, number).astype(ids.dtype)


@lru_cache(1)
def _sampler(tokenizer: bytes, sampling: SubwordSampling) -> SubwordSampler:
    return SubwordSampler(SentencePieceTokenizer(tokenizer), sampling)


def _decode_chunks(tokenizer: Tokenizer, ids: Tokens) -> Iterator[TextChunk]:
    """The text of `ids`, one chunk per document."""
    ends = ids == (-1 if tokenizer.eos_id is None else tokenizer.eos_id)
    for document in np.split(ids, np.flatnonzero(ends) + 1):
        if len(document):
            yield TextChunk(tokenizer.decode(document.tolist()), document[-1] == tokenizer.eos_id)
