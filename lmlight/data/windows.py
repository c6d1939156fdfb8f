"""The order of training and evaluation windows, as pure functions of (seed, epoch, position).

- A training epoch is a random offset into the stream and a random permutation of the non-overlapping windows from there.
  In the order `epoch`, no token is a target twice; fewer than 2 T tokens at the ends are left out. Window boundaries
  move from epoch to epoch. Resegmented text keeps its number of windows, so some are dropped or repeated.
- Training tokens come in shards. Stored tokens are read as one shard, whatever the number of files (`stored_windows`).
  Tokens that are resegmented or streamed come in several: `subword_regularization.resegmented_windows`,
  `streaming.streamed_windows`.
- Evaluation scores every token exactly once.
- Every rank takes its slice of one global order, so nothing depends on the number of processes or workers.

Axes: B windows in a batch, W in all, T positions, N tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np
import numpy.typing as npt

from lmlight.data.token_store import TokenArray, Tokens
from lmlight.data.workers import killed_workers_reported
from lmlight.errors import UserError


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """Windows per epoch: at least one, and the same for every epoch offset."""
    return max(1, (n_tokens - 1) // block_size - 1)


def epoch_starts(n_tokens: int, block_size: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """(windows_per_epoch,) start of each window, in training order. The targets of two windows do not overlap.

    Args:
        n_tokens: length of the stream, at least `block_size` + 1.
        block_size: T. A window reads T + 1 tokens.
        random: draws the offset and the order.
    """
    n_windows = windows_per_epoch(n_tokens, block_size)
    offset = random.integers(n_tokens - n_windows * block_size)
    return offset + block_size * random.permutation(n_windows)


def random_starts(n_tokens: int, block_size: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Like `epoch_starts`, but drawn independently, as in nanoGPT: an epoch repeats some tokens and misses others."""
    return random.integers(n_tokens - block_size, size=windows_per_epoch(n_tokens, block_size))


ORDERS = {"epoch": epoch_starts, "random": random_starts}


class WindowSource:
    """Training windows, in an order that is a pure function of (seed, epoch, position).

    All windows of one shard are visited, then all of the next, in a different order in each epoch.

    Args:
        load: returns the ids (N,) of a shard, given the epoch and the shard's number.
        lengths: tokens in each shard. Shards of at most `block_size` tokens are left out.
        block_size: T.
        seed: the run's seed.
        order: `epoch` or `random`, see `ORDERS`.
        pool: loads shards in the background; None loads each when it is needed.
        ahead: number of shards, including those of later epochs, that `pool` loads before they are needed.
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
        """The ids (B, T + 1) of the windows at `positions` of the epoch."""
        ends = np.cumsum(self._per_shard[self._order(epoch)])
        slots = np.searchsorted(ends, positions, side="right")
        rows = np.empty((len(positions), self._block_size + 1), np.int64)
        for slot in np.unique(slots):
            self._open(epoch, slot)
            here = slots == slot
            starts = self._starts[positions[here] - ends[slot]]  # negative: from the shard's last window
            rows[here] = self._ids[starts[:, None] + np.arange(self._block_size + 1)]
        return rows

    def close(self) -> None:
        """Stops processes and threads that work ahead."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The shards in the order in which an epoch visits them."""
        shards = np.random.default_rng((self._seed, epoch)).permutation(len(self._per_shard))
        return shards[self._per_shard[shards] > 0]

    def _open(self, epoch: int, slot: int) -> None:
        """Loads the shard that an epoch visits at `slot`, and requests those that follow."""
        visits = ((e, int(shard)) for e in count(epoch) for shard in self._order(e)[slot if e == epoch else 0 :])
        wanted = list(islice(visits, 1 + self._ahead))
        if wanted[0] == self._loaded:
            return
        if self._pool is None:
            self._ids = self._load(*wanted[0])
        else:
            for visit in self._requested.keys() - wanted:  # left over from an epoch that ended early
                self._requested.pop(visit).cancel()
            with killed_workers_reported():
                for visit in wanted:
                    if visit not in self._requested:
                        self._requested[visit] = self._pool.submit(self._load, *visit)
                self._ids = self._requested.pop(wanted[0]).result()
        if len(self._ids) <= self._block_size:  # a sampled segmentation can be shorter than the stored one
            self._ids = np.resize(self._ids[:], self._block_size + 1)
        self._loaded = _, shard = wanted[0]
        numbers = (self._seed, epoch, shard) if len(self._per_shard) > 1 else (self._seed, epoch)
        starts = self._starts_of(len(self._ids), self._block_size, np.random.default_rng(numbers))
        self._starts = np.resize(starts, self._per_shard[shard])  # segmentations vary in length, epochs do not


def stored_windows(ids: TokenArray, block_size: int, seed: int, order: str, num_workers: int = 0) -> WindowSource:
    """Windows of the ids as they are stored."""
    return WindowSource(partial(_stored, ids), [len(ids)], block_size, seed, order, num_workers=num_workers)


def _stored(ids: TokenArray, epoch: int, shard: int) -> TokenArray:
    return ids


@dataclass(frozen=True)
class TrainBatchSampler:
    """One rank's micro-batches of an epoch, as positions in the epoch's order.

    A global batch is split into the micro-batches of gradient accumulation and then among the ranks, so an optimizer step
    sees the same windows for any number of either. An incomplete last batch is dropped; an epoch shorter than one batch
    is repeated to fill it.

    Args:
        n_windows: windows in the epoch.
        batch_size: windows per optimizer step over all ranks.
        rank: the index of this process, from 0.
        world_size: number of processes.
        accumulate: micro-batches per optimizer step.

    Raises:
        UserError: `accumulate` is less than 1, or `batch_size` is not a multiple of `world_size * accumulate`.
    """

    n_windows: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UserError(f"trainer.accumulate_grad_batches must be at least 1, got {self.accumulate}")
        if self.batch_size % (self.world_size * self.accumulate):
            raise UserError(
                f"data.batch_size {self.batch_size} counts the windows of a whole step: it must be a multiple of "
                f"{self.world_size} processes × {self.accumulate} accumulated batches"
            )

    @property
    def windows_per_micro_batch(self) -> int:
        """Over all ranks."""
        return self.batch_size // self.accumulate

    def __len__(self) -> int:
        """Micro-batches per epoch."""
        return max(1, self.n_windows // self.batch_size) * self.accumulate

    def batches(self, first: int = 0) -> Iterator[list[int]]:
        """The micro-batches from number `first` on."""
        size = self.windows_per_micro_batch // self.world_size
        for step in range(first, len(self)):
            begin = (step * self.world_size + self.rank) * size
            yield [position % self.n_windows for position in range(begin, begin + size)]


def eval_windows(n_tokens: int, block_size: int, stride: int) -> npt.NDArray[np.int64]:
    """(W, 3) start, length and first scored position of windows that score every token but the first exactly once.

    Only the last one may be shorter than `block_size`. With a `stride` of `block_size` they do not overlap; half of it gives
    every token after the first window at least half a block of context.
    """
    targets = max(0, n_tokens - 1)  # target t is token t + 1
    starts = stride * np.arange(max(0, -(-(targets - block_size) // stride)) + (targets > 0), dtype=np.int64)
    lengths = np.minimum(block_size, targets - starts)
    scored_from = np.where(starts == 0, 0, block_size - stride)
    return np.stack((starts, lengths, scored_from), axis=1)


def subset_windows(n_tokens: int, block_size: int, windows: int) -> npt.NDArray[np.int64]:
    """Up to `windows` non-overlapping whole windows, evenly spaced in the stream, in the format of `eval_windows`."""
    starts = np.unique(np.linspace(0, n_tokens - 1 - block_size, windows).astype(np.int64) // block_size * block_size)
    return np.stack((starts, np.full_like(starts, block_size), np.zeros_like(starts)), axis=1)
