"""Windows of token ids as batches, and the loader of those that are trained on.

- Windows are gathered a batch at a time, from wherever the ids are.
- A batch carries the characters that each target stands for, so the loss needs no tokenizer and figures of different
  vocabularies compare.

Axes: B windows, T positions. Free of lightning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lmlight.data.resegment import ShardedEpoch
from lmlight.data.token_store import TokenArray
from lmlight.data.windows import TrainBatchSampler
from lmlight.errors import UserError

# The target of a position that is context only; `torch.nn.functional.cross_entropy` passes over it.
IGNORE_INDEX = -100


class Batch(NamedTuple):
    """What a net sees and what it should say.

    Attributes:
        inputs: (B, T) token ids.
        targets: (B, T) the ids that follow; `IGNORE_INDEX` where a position is context only.
        target_chars: (B, T) the characters of text that each target stands for; 0 where unscored.
    """

    inputs: Tensor
    targets: Tensor
    target_chars: Tensor


def make_batch(ids: npt.NDArray[np.integer], char_counts: npt.NDArray[np.number]) -> Batch:
    """(B, T + 1) ids as windows of which every target is scored, with the (V,) characters of each id."""
    ids = ids.astype(np.int64)
    return Batch(torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:]), torch.tensor(char_counts[ids[:, 1:]]))


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
        ids: npt.NDArray[np.integer] | TokenArray,
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
        batch = make_batch(self.ids[self.starts[which, None] + np.arange(length + 1)], self.char_counts)
        if self.scored_from is None:
            return batch
        unscored = torch.from_numpy(np.arange(length) < self.scored_from[which, None])
        targets, chars = batch.targets.masked_fill(unscored, IGNORE_INDEX), batch.target_chars.masked_fill(unscored, 0)
        return Batch(batch.inputs, targets, chars)


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
        return make_batch(self.epoch.rows(np.asarray(indices)), self.char_counts)


def identity_collate(batch: Any) -> Batch:
    """Collates nothing: `Windows` gives whole batches. (A function with a name, so that workers can be spawned.)"""
    return batch


class StatefulTrainLoader:
    """The training batches, epoch after epoch, from wherever a run was interrupted.

    Args:
        windows: gives the windows of an epoch, in the order in which they are to be seen.
        order: cuts that order into this process's batches.
        num_workers: of the DataLoader that gathers them.
        fingerprint: gives that of the text, which a position in it goes with.

    Attributes:
        waited: seconds that training has spent waiting for batches.
    """

    def __init__(
        self,
        windows: Callable[[int], Dataset[Batch]],
        order: TrainBatchSampler,
        num_workers: int,
        fingerprint: Callable[[], str],
    ) -> None:
        self._windows, self._order, self._num_workers, self._fingerprint = windows, order, num_workers, fingerprint
        self._epoch, self._seen = -1, 0  # micro-batches of the epoch that have been handed out
        self._resuming = False
        self.waited = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the position in it in windows over all ranks: it means the same to any number of processes."""
        seen = self._seen * self._order.windows_per_micro_batch
        return {"epoch": self._epoch, "windows": seen, "text": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there at the next `iter`.

        Raises:
            UserError: the position is one in another text.
        """
        if state_dict.get("text", self._fingerprint()) != self._fingerprint():
            raise UserError(
                "the training text is not the one that this run has read so far: go on with that one, or begin anew from "
                "its weights, --init_from in place of --ckpt_path"
            )
        self._epoch = state_dict["epoch"]
        self._seen = state_dict["windows"] // self._order.windows_per_micro_batch
        self._resuming = self._seen < len(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so begun at the first batch: Lightning calls `iter` once before it hands over the state. Epochs are
        # counted here: Lightning's count falls behind when a resumed run is resumed again from the end of an epoch.
        if not self._resuming:
            self._epoch, self._seen = self._epoch + 1, 0
        self._resuming = False
        began = time.perf_counter()
        batches = DataLoader(
            self._windows(self._epoch),
            batch_sampler=self._order.batches(self._seen),
            collate_fn=identity_collate,
            num_workers=self._num_workers,
            generator=torch.Generator(),
        )
        for batch in batches:
            self._seen += 1  # what has been handed out, not what workers have fetched ahead
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()
