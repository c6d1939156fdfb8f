"""Batches of token windows, and the loaders for training and evaluation.

A batch includes the number of characters of each target, so the loss per character needs no tokenizer.

Axes: B windows, T positions, V vocabulary, W evaluation windows, N tokens.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lmlight.data.token_store import TokenArray, Tokens, TokenStore
from lmlight.data.windows import TrainBatchSampler, WindowSource
from lmlight.data.workers import ignore_ctrl_c
from lmlight.errors import UserError

# The target of a context-only position; the default `ignore_index` of `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100
# Logits of an evaluation batch: 1 GiB in float32. `batch_size` is the number of windows per optimizer step, which may be
# many micro-batches, so an evaluation batch may have to be smaller.
MAX_EVAL_LOGITS = 2**28


class Batch(NamedTuple):
    """The inputs and targets of a network.

    Attributes:
        inputs: (B, T) token ids.
        targets: (B, T) the next token ids; `IGNORE_INDEX` at context-only positions.
        target_chars: (B, T) the number of characters of each target; 0 at context-only positions.
    """

    inputs: Tensor
    targets: Tensor
    target_chars: Tensor


def make_batch(rows: Tokens, char_counts: npt.NDArray[np.number]) -> Batch:
    """Makes a batch from token ids (B, T + 1), given the number of characters (V,) of each id. All targets are scored."""
    rows = rows.astype(np.int64)
    return Batch(torch.tensor(rows[:, :-1]), torch.tensor(rows[:, 1:]), torch.tensor(char_counts[rows[:, 1:]]))


def as_batch(batch: Any) -> Batch:
    """Checks the shapes and types of a `Batch`, or makes one, without character counts, from a pair (inputs, targets).

    Raises:
        UserError: it is neither.
    """
    try:
        inputs, targets, chars = batch if isinstance(batch, Batch) else (*batch, torch.zeros_like(batch[1]))
        have_ids = not (inputs.is_floating_point() or targets.is_floating_point())
        is_valid = have_ids and inputs.ndim == 2 and inputs.shape == targets.shape == chars.shape
    except (TypeError, ValueError, AttributeError, LookupError):
        is_valid = False
    if not is_valid:
        raise UserError(
            "a batch must be a pair (inputs, targets), or a Batch, of (B, T) tensors of token ids, where targets are the "
            f"ids that follow; got {_describe(batch)}"
        )
    return Batch(inputs.long(), targets.long(), chars)


def _describe(batch: Any) -> str:
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {len(batch)}: {', '.join(map(_describe, batch[:3]))}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} and type {batch.dtype}"
    return f"a {type(batch).__name__}"


class EvalLoader:
    """One rank's batches of evaluation windows, each window once. A shorter last window is a batch of its own.

    Args:
        ids: (N,) the tokens.
        windows: (W, 3) see `eval_windows`. Only the last window may be shorter than the others.
        char_counts: (V,) see `Tokenizer`.
        batch_size: windows per batch; fewer if their logits would exceed `MAX_EVAL_LOGITS`.
        rank, world_size: the index of this process, from 0, and the number of processes.
    """

    def __init__(
        self,
        ids: TokenArray,
        windows: npt.NDArray[np.int64],
        char_counts: npt.NDArray[np.number],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._ids, self.windows, self._char_counts = ids, windows, char_counts
        length = int(windows[0, 1])
        full = int((windows[:, 1] == length).sum())
        batch_size = min(batch_size, max(1, MAX_EVAL_LOGITS // (length * len(char_counts))))
        batches = [batch for batch in np.split(windows, [*range(batch_size, full, batch_size), full]) if len(batch)]
        # a window that scores nothing fills the last round, so that all ranks have the same number of batches
        batches += [np.array([[0, length, length]])] * (-len(batches) % world_size)
        self._batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for windows in self._batches:
            starts, lengths, scored_from = windows.T
            positions = np.arange(lengths[0] + 1)
            inputs, targets, chars = make_batch(self._ids[starts[:, None] + positions], self._char_counts)
            context = torch.from_numpy(positions[:-1] < scored_from[:, None])
            yield Batch(inputs, targets.masked_fill(context, IGNORE_INDEX), chars.masked_fill(context, 0))


class WindowDataset(Dataset[Batch]):
    """The training windows of one epoch. Indexed with a list of positions, it returns a batch."""

    def __init__(self, source: WindowSource, epoch: int, char_counts: npt.NDArray[np.number]) -> None:
        self.source, self.epoch, self.char_counts = source, epoch, char_counts

    def __getitem__(self, positions: list[int]) -> Batch:
        return make_batch(self.source.rows(self.epoch, np.asarray(positions)), self.char_counts)


class StatefulTrainLoader:
    """Training batches, epoch after epoch, which continue where an interrupted run stopped.

    Args:
        store, source: the tokens and their windows.
        sampler: splits an epoch into this process's micro-batches.
        device: the GPU that batches are copied to. They are put in pinned memory, one batch ahead of use.
        limit: `trainer.limit_train_batches`: the number or fraction of an epoch's batches to use.
        repeat: use the windows of the first epoch in every epoch.

    Attributes:
        data_wait_seconds: time that training has waited for batches.
    """

    def __init__(
        self,
        store: TokenStore,
        source: WindowSource,
        sampler: TrainBatchSampler,
        device: torch.device | None = None,
        limit: float = 1.0,
        repeat: bool = False,
    ) -> None:
        self._store, self._source, self.sampler, self._device = store, source, sampler, device
        self._limit = limit if isinstance(limit, int) else int(limit * len(sampler))
        self._repeat = repeat
        self._epoch, self._seen = -1, 0  # `_seen` counts the micro-batches of the epoch that have been returned
        self._resuming = False
        self.data_wait_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The epoch and how many of its windows the ranks have seen in total, so any number of processes can resume."""
        seen = self._seen * self.sampler.windows_per_micro_batch
        return {"epoch": self._epoch, "windows": seen, "text": self._store.train_fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from this state at the next `iter`.

        Raises:
            UserError: the state belongs to another text.
        """
        if state_dict["text"] != self._store.train_fingerprint:
            raise UserError(
                "the training text is not the one that this run has read so far: resume with that text, or start a new "
                "run from the weights with --init_from in place of --ckpt_path"
            )
        self._epoch = state_dict["epoch"]
        self._seen = state_dict["windows"] // self.sampler.windows_per_micro_batch
        self._resuming = self._seen < min(self._limit, len(self.sampler))

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that nothing runs until the first batch is requested: Lightning calls `iter` before it restores the
        # state. Epochs are counted here, because Lightning's count falls behind when a run is resumed twice at the end of an
        # epoch.
        if not self._resuming:
            self._epoch, self._seen = 0 if self._repeat else self._epoch + 1, 0
        self._resuming = False
        began = time.perf_counter()
        batches: Iterator[Batch] = iter(
            DataLoader(
                WindowDataset(self._source, self._epoch, self._store.char_counts["train"]),
                sampler=self.sampler.batches(self._seen),
                batch_size=None,  # an item is a batch
                num_workers=self._source.num_workers,
                worker_init_fn=ignore_ctrl_c,
                generator=torch.Generator(),  # otherwise the loader draws a number from the global generator
                pin_memory=self._device is not None,
            )
        )
        for batch in prefetch(batches, self._device) if self._device else batches:
            self._seen += 1  # not when it was fetched: that may be ahead of use
            self.data_wait_seconds += time.perf_counter() - began
            yield batch
            began = time.perf_counter()


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, each of which is fetched in a thread while the one before it is in use."""
    # without `set_device`, pinning memory in the thread would create a CUDA context on the first GPU
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
