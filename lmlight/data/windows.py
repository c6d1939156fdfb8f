"""Which windows of the text make up which step: pure functions of (seed, epoch, position).

- An epoch is a seeded offset into the text and a seeded permutation of the windows that do not overlap from there, so
  each token is seen once and window borders move from epoch to epoch.
- Nothing depends on the number of processes or loader workers: every rank takes its slice of one global order.
- Evaluation scores each token exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """How many windows fit whichever offset an epoch begins with; at least one."""
    return max(1, (n_tokens - 1) // block_size - 1)


def epoch_starts(
    n_tokens: int, block_size: int, seed: int, epoch: int, shard: int | None = None
) -> npt.NDArray[np.int64]:
    """Where the windows of an epoch begin, in the order in which they are seen.

    Args:
        n_tokens: length of the stream; at least `block_size` + 1.
        block_size: T; a window reads T + 1 tokens.
        seed: of the run.
        epoch: counted from 0.
        shard: the number of the part of a text that the stream is, if it is not all of it.

    Returns:
        (windows_per_epoch,) starts, no two windows overlapping in their targets.
    """
    n_windows = windows_per_epoch(n_tokens, block_size)
    random = np.random.default_rng((seed, epoch) if shard is None else (seed, epoch, shard))
    offset = random.integers(n_tokens - n_windows * block_size)
    return offset + block_size * random.permutation(n_windows)


def random_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The same number of windows drawn independently, as notebooks do: some text is seen twice, some not at all."""
    random = np.random.default_rng((seed, epoch))
    return random.integers(n_tokens - block_size, size=windows_per_epoch(n_tokens, block_size))


def eval_windows(n_tokens: int, block_size: int, stride: int) -> npt.NDArray[np.int64]:
    """Windows (W, 3), each `start, length, scored_from`, in which every token but the first is scored exactly once.

    Args:
        n_tokens: length of the stream; its first token is context only.
        block_size: the longest window.
        stride: from one window to the next. `block_size` gives windows that do not overlap; half of it gives every
            token, the first few apart, at least half a block of context.
    """
    targets = max(0, n_tokens - 1)  # target t is token t + 1
    starts = stride * np.arange(max(0, -(-(targets - block_size) // stride)) + (targets > 0), dtype=np.int64)
    lengths = np.minimum(block_size, targets - starts)
    scored_from = np.where(starts == 0, 0, block_size - stride)
    return np.stack((starts, lengths, scored_from), axis=1)


@dataclass(frozen=True)
class TrainBatchSampler:
    """One rank's part of an epoch's order: for each of its micro-batches, the positions of its windows.

    The global batch is cut first into the micro-batches of gradient accumulation, then among the ranks, so that the
    windows of an optimizer step are the same ones for any number of either. A last batch that is not full is left out;
    an epoch shorter than one batch is repeated to fill it.

    Args:
        n_windows: in the epoch.
        batch_size: windows in one optimizer step, over all ranks; a multiple of `world_size * accumulate`.
        rank: this process, counted from 0.
        world_size: number of processes.
        accumulate: micro-batches in one optimizer step.
    """

    n_windows: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    @property
    def windows_per_micro_batch(self) -> int:
        """Over all ranks."""
        return self.batch_size // self.accumulate

    def __len__(self) -> int:
        """Micro-batches in the epoch."""
        return max(1, self.n_windows // self.batch_size) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches(0)

    def batches(self, first: int) -> Iterator[list[int]]:
        """The micro-batches from number `first` on."""
        micro = self.windows_per_micro_batch // self.world_size
        for step in range(first, len(self)):
            begin = (step * self.world_size + self.rank) * micro
            yield [position % self.n_windows for position in range(begin, begin + micro)]


@dataclass(frozen=True)
class EvalBatchSampler:
    """One rank's batches of windows to be scored once.

    Args:
        full: windows of a whole block, which come first.
        windows: in all; each shorter one is a batch of its own. Window number `windows` scores nothing: it fills the last
            round, so that all ranks have as many batches.
        batch_size: windows in a batch.
        rank: this process, counted from 0.
        world_size: number of processes.
    """

    full: int
    windows: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return -(-self._batches // self.world_size)

    @property
    def _batches(self) -> int:
        """Over all ranks."""
        return -(-self.full // self.batch_size) + self.windows - self.full

    def __iter__(self) -> Iterator[list[int]]:
        of_full = -(-self.full // self.batch_size)
        for number in range(self.rank, len(self) * self.world_size, self.world_size):
            if number < of_full:
                yield list(range(number * self.batch_size, min((number + 1) * self.batch_size, self.full)))
            else:
                yield [min(self.full + number - of_full, self.windows)]
