"""Sources of training windows behind one interface, `WindowSource`.

- `TokenWindows` draws windows from the whole stream, in memory or memory-mapped.
- `ShardedWindows` visits one shard after the other, for ids that are made or fetched shortly before use:
  `ResegmentedWindows` segments every shard anew in every epoch, `streaming.StreamedWindows` reads object storage.

Axes: B windows, T positions. Free of torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmlight.data.reading import TextChunk
from lmlight.data.subword_regularization import SubwordSampler, SubwordSampling
from lmlight.data.token_store import TokenArray, Tokens
from lmlight.data.tokenizer import Tokenizer, deserialize, serialize
from lmlight.data.windows import epoch_starts, random_starts, windows_per_epoch
from lmlight.data.workers import WorkerPool
from lmlight.errors import UserError

STARTS = {"epoch": epoch_starts, "random": random_starts}


class WindowSource(ABC):
    """Training windows, in an order that is a pure function of (seed, epoch, position).

    Attributes:
        num_workers: DataLoader processes that should gather windows.

    Args:
        block_size: T.
        seed: the run's seed.
        order: `epoch` or `random`, see `windows`.
    """

    num_workers = 0

    def __init__(self, block_size: int, seed: int, order: str) -> None:
        self._block_size, self._seed, self._starts_of = block_size, seed, STARTS[order]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the training text and its tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """Windows per epoch; the same for every epoch."""

    @abstractmethod
    def rows(self, epoch: int, positions: npt.NDArray[np.int64]) -> Tokens:
        """(B, T + 1) ids of the windows at `positions` of the epoch."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Stops processes and threads that work ahead."""

    def _gather(self, ids: TokenArray | Tokens, starts: npt.NDArray[np.int64]) -> Tokens:
        return ids[starts[:, None] + np.arange(self._block_size + 1)]


class TokenWindows(WindowSource):
    """Windows of one stream of ids (N,)."""

    def __init__(self, ids: TokenArray, block_size: int, seed: int, order: str, num_workers: int = 0) -> None:
        super().__init__(block_size, seed, order)
        self._ids, self.num_workers = ids, num_workers
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return windows_per_epoch(len(self._ids), self._block_size)

    @property
    def fingerprint(self) -> str:
        return self._ids.fingerprint

    def rows(self, epoch: int, positions: npt.NDArray[np.int64]) -> Tokens:
        if epoch != self._epoch:
            self._starts = self._starts_of(len(self._ids), self._block_size, self._seed, epoch)
            self._epoch = epoch
        return self._gather(self._ids, self._starts[positions])


class ShardedWindows(WindowSource):
    """Windows that are visited shard by shard: all windows of one, then all of the next, in an order of the epoch's own.

    Args:
        lengths: tokens in each shard. Shards of at most `block_size` tokens are left out.
        ahead: number of shards to request before they are needed.
    """

    def __init__(self, lengths: Sequence[int], ahead: int, block_size: int, seed: int, order: str) -> None:
        super().__init__(block_size, seed, order)
        self._per_shard = np.array([windows_per_epoch(n, block_size) if n > block_size else 0 for n in lengths])
        if not len(self):
            raise UserError(f"no shard of the training text is longer than data.block_size {block_size}: lower it")
        self._ahead = ahead
        self._requested: dict[tuple[int, int], Future[Tokens]] = {}
        self._loaded: tuple[int, int] | None = None  # epoch and shard

    @abstractmethod
    def _request(self, epoch: int, shard: int) -> Future[Tokens]:
        """The ids (N,) of a shard in an epoch, which may be worked on in the background."""

    def __len__(self) -> int:
        return int(self._per_shard.sum())

    def rows(self, epoch: int, positions: npt.NDArray[np.int64]) -> Tokens:
        shards = np.random.default_rng((self._seed, epoch)).permutation(len(self._per_shard))
        shards = shards[self._per_shard[shards] > 0]
        ends = np.cumsum(self._per_shard[shards])
        slots = np.searchsorted(ends, positions, side="right")
        rows = np.empty((len(positions), self._block_size + 1), np.int64)
        for slot in np.unique(slots):
            self._load([(epoch, int(shard)) for shard in shards[slot : slot + 1 + self._ahead]])
            here = slots == slot
            from_end = positions[here] - ends[slot]  # negative
            rows[here] = self._gather(self._ids, self._starts[from_end])
        return rows

    def _load(self, wanted: list[tuple[int, int]]) -> None:
        """Loads the first of the wanted shards and requests all of them."""
        if wanted[0] == self._loaded:
            return
        for key in self._requested.keys() - wanted:  # of an epoch that was left early
            self._requested.pop(key).cancel()
        for key in wanted:
            if key not in self._requested:
                self._requested[key] = self._request(*key)
        self._ids = self._requested.pop(wanted[0]).result()
        epoch, shard = wanted[0]
        number = shard if len(self._per_shard) > 1 else None
        starts = self._starts_of(len(self._ids), self._block_size, self._seed, epoch, number)
        self._starts = np.resize(starts, self._per_shard[shard])  # segmentations vary in length, epochs do not
        self._loaded = wanted[0]


class ResegmentedWindows(ShardedWindows):
    """Subword regularization: every epoch segments every shard anew, as a pure function of (seed, epoch, shard).

    Args:
        ids: the stored training ids.
        tokenizer: the store's tokenizer, a unigram model.
        sampling: how to sample.
        processes: worker processes, each of which segments one shard ahead of use. 0 segments in this process. So does a
            text of one shard, whose words are prepared once for all epochs.

    Raises:
        UserError: see `SubwordSampler`.
    """

    def __init__(
        self,
        ids: TokenArray,
        tokenizer: Tokenizer,
        sampling: SubwordSampling,
        processes: int,
        block_size: int,
        seed: int,
        order: str,
    ) -> None:
        self._single = len(ids.shards) == 1
        super().__init__(ids.lengths.tolist(), 0 if self._single else processes, block_size, seed, order)
        self._stored = ids
        self._sampler = SubwordSampler(tokenizer, _decode_chunks(tokenizer, ids[:]) if self._single else "", sampling)
        self._worker_arguments = serialize(tokenizer), sampling, seed
        self._pool: WorkerPool | None = None

    @property
    def fingerprint(self) -> str:
        return self._stored.fingerprint

    def _request(self, epoch: int, shard: int) -> Future[Tokens]:
        path = self._stored.shards[shard]
        assert isinstance(path, Path)
        if self._ahead:
            self._pool = self._pool or WorkerPool(self._ahead, _start_worker, *self._worker_arguments)
            return self._pool.submit(_segment_in_worker, path, epoch, shard)
        future = Future[Tokens]()
        if self._single:
            future.set_result(self._sampler.sample_segmentation(self._seed, epoch))
        else:
            future.set_result(_segment(self._sampler, path, self._seed, epoch, shard))
        return future

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            self._requested.clear()


def _decode_chunks(tokenizer: Tokenizer, ids: Tokens) -> Iterator[TextChunk]:
    """The text of `ids`, one chunk per document."""
    ends = ids == (-1 if tokenizer.eos_id is None else tokenizer.eos_id)
    for document in np.split(ids, np.flatnonzero(ends) + 1):
        if len(document):
            yield TextChunk(tokenizer.decode(document.tolist()), document[-1] == tokenizer.eos_id)


def _segment(sampler: SubwordSampler, path: Path, seed: int, epoch: int, shard: int) -> Tokens:
    ids = np.load(path)
    return sampler.sample_shard(_decode_chunks(sampler.tokenizer, ids), seed, epoch, shard).astype(ids.dtype)


_worker_state: tuple[SubwordSampler, int] | None = None


def _start_worker(tokenizer: bytes, sampling: SubwordSampling, seed: int) -> None:
    global _worker_state
    _worker_state = SubwordSampler(deserialize(tokenizer), "", sampling), seed


def _segment_in_worker(path: Path, epoch: int, shard: int) -> Tokens:
    assert _worker_state is not None
    sampler, seed = _worker_state
    return _segment(sampler, path, seed, epoch, shard)
