"""Windows of token ids as batches.

- Windows are gathered a batch at a time, from wherever the ids are.
- A batch carries the characters that each target stands for, so the loss needs no tokenizer and figures of different
  vocabularies compare.

Axes: B windows, T positions. Free of lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lmlight.data.resegment import ShardedEpoch
from lmlight.data.store import Ids

# The target of a position that is context only; `torch.nn.functional.cross_entropy` passes over it.
UNSCORED = -100


class Batch(NamedTuple):
    """What a net sees and what it should say.

    Attributes:
        inputs: (B, T) token ids.
        targets: (B, T) the ids that follow; `UNSCORED` where a position is context only.
        target_chars: (B, T) the characters of text that each target stands for; 0 where unscored.
    """

    inputs: Tensor
    targets: Tensor
    target_chars: Tensor


class Windows(Dataset[Batch]):
    """Windows of a stream of ids, gathered a batch at a time by one indexing operation.

    Args:
        ids: (N,) the stream.
        starts: where each window begins.
        lengths: T of each window; it reads T + 1 ids, for the targets are the inputs shifted by one. Windows asked for
            together must have the same one.
        char_counts: (V,) see `Tokenizer`.
        scored_from: for each window, its first scored position; everything before is context. None scores all.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.integer] | Ids,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64] | int,
        char_counts: npt.NDArray[np.number],
        scored_from: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.ids, self.starts = ids, starts
        self.lengths = np.broadcast_to(lengths, starts.shape)
        self.char_counts, self.scored_from = char_counts, scored_from

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of the windows `indices`: the hook through which a DataLoader asks for a whole batch."""
        which = np.asarray(indices)
        length = self.lengths[which[0]]
        assert (self.lengths[which] == length).all()
        ids = self.ids[self.starts[which, None] + np.arange(length + 1)].astype(np.int64)  # (B, T + 1)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        chars = self.char_counts[targets]
        if self.scored_from is not None:
            unscored = np.arange(length) < self.scored_from[which, None]
            targets, chars = np.where(unscored, UNSCORED, targets), np.where(unscored, 0, chars)
        return Batch(torch.tensor(inputs), torch.tensor(targets), torch.tensor(chars))


class ShardedWindows(Dataset[Batch]):
    """An epoch that goes from shard to shard, as batches; for positions that do not go back.

    Args:
        epoch: gives the ids.
        char_counts: (V,) see `Tokenizer`.
    """

    def __init__(self, epoch: ShardedEpoch, char_counts: npt.NDArray[np.number]) -> None:
        self.epoch, self.char_counts = epoch, char_counts

    def __len__(self) -> int:
        return len(self.epoch)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """See `Windows`."""
        ids = self.epoch.rows(np.asarray(indices)).astype(np.int64)  # (B, T + 1)
        targets = ids[:, 1:]
        return Batch(torch.tensor(ids[:, :-1]), torch.tensor(targets), torch.tensor(self.char_counts[targets]))


def as_batch(batch: Any) -> Batch:
    """Collates nothing: `Windows` gives whole batches. (A function with a name, so that workers can be spawned.)"""
    return batch
