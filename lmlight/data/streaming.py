"""Training from object storage: a store whose training text lies in chunks of litdata's, which come while they are used.

- The folder is a token store, but that its training shards are the last two only (for what needs a little of that text:
  the context of the first validation token, the gap between training and validation); all of it is in `train/`.
- Chunks, their order, their download and the place in them to resume from are litdata's. What a net sees is a `Batch`.

litdata is an extra, imported where it is used.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmlight.data.loader import Batch, make_batch
from lmlight.data.token_store import INDEX, TokenStore, new_folder, shard_name
from lmlight.errors import UserError

CHUNKS = "train"
CHUNK_BYTES = 2**26  # litdata's own advice for object storage
KEPT_SHARDS = 2


def litdata() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # else it asks the package index at every start
    try:
        import litdata
    except ImportError:
        raise UserError("streaming needs litdata: pip install 'lmlight[streaming]'") from None
    return litdata


def write(store: TokenStore, target: Path) -> TokenStore:
    """Writes a store that is streamed, from one that is not.

    Args:
        store: a whole one.
        target: a folder that is not there yet; it appears when all of it is done.

    Raises:
        UserError: litdata is not installed; the store's tokenizer is lossy, or its training text in chunks already; the
            folder cannot be written.
    """
    package = litdata()
    if store.streamed is not None:
        raise UserError(f"'{store.folder}' is in litdata's chunks already: copy that folder")
    if not store.tokenizer.lossless:  # its figures are scaled by how often each piece occurs in all of the text
        raise UserError(
            "--format litdata needs a tokenizer that loses nothing: leave out --data.tokenizer.lossless false"
        )
    train = store.ids["train"]
    shards = [shard for shard in train.parts if isinstance(shard, Path)]
    with new_folder(target) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own defaults
            package.optimize(
                _ids,
                inputs=[str(shard.resolve()) for shard in shards],
                output_dir=str(folder / CHUNKS),
                chunk_bytes=CHUNK_BYTES,
                item_loader=package.TokensLoader(),
                num_workers=1,  # several would cut chunks elsewhere, and reading is all the work there is
                keep_data_ordered=True,
                verbose=False,
            )
        index = json.loads((store.folder / INDEX).read_text("utf-8"))
        for file in sorted(store.folder.iterdir()):
            if file.is_file() and file.name != INDEX and file not in shards:
                shutil.copyfile(file, folder / file.name)
        kept = train.lengths[-KEPT_SHARDS:].tolist()
        for number, shard in enumerate(shards[-KEPT_SHARDS:]):
            shutil.copyfile(shard, folder / shard_name("train", number))
        index["splits"]["train"]["tokens"], index["streamed"] = kept, len(train)
        (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
    return TokenStore(target)


def _ids(shard: str) -> Iterator[npt.NDArray[np.integer]]:
    yield np.load(shard)


class StreamedLoader:
    """The training batches of one process; where `StatefulTrainLoader` reads a disk, this follows litdata.

    A window is `block_size` + 1 tokens, and no two of an epoch overlap: the first token of each is context only. litdata
    permutes the chunks, and the windows in each, by (seed, epoch).

    Args:
        place: the folder or address of the store.
        block_size: T.
        batch_size: windows in one of this process's batches.
        accumulate: batches in one optimizer step; an epoch is a whole number of those.
        char_counts: (V,) see `Tokenizer`.
        seed: of the run.
        num_workers: processes that read.

    Attributes:
        waited: seconds that training has spent waiting for batches.

    Raises:
        UserError: litdata is not installed; the chunks cannot be read; there are fewer windows than a batch needs.
    """

    def __init__(
        self,
        place: str,
        block_size: int,
        batch_size: int,
        accumulate: int,
        char_counts: npt.NDArray[np.number],
        seed: int,
        num_workers: int,
    ) -> None:
        package = litdata()
        self._accumulate = accumulate
        try:
            self._dataset = package.StreamingDataset(
                f"{place.rstrip('/')}/{CHUNKS}",
                item_loader=package.TokensLoader(block_size=block_size + 1),
                item_shuffle_window=0,  # of the whole chunk
                shuffle=True,
                drop_last=True,
                seed=seed,
            )
            self._loader = package.StreamingDataLoader(
                self._dataset,
                batch_size=batch_size,
                num_workers=num_workers,
                collate_fn=partial(_batch, char_counts),
                generator=torch.Generator(),  # its own: the loader would take a number from the global one
            )
            size = len(self._loader)
        except Exception as error:  # of whichever driver it is
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the chunks in '{place}' cannot be read ({reason}): copy or prepare them again") from None
        if size < accumulate:
            raise UserError(
                f"the training text in '{place}' has fewer windows than one step takes: lower --data.batch_size or "
                "--data.block_size"
            )
        self._windows_per_batch = batch_size * self._dataset.distributed_env.world_size
        self._resuming = False
        self.waited = 0.0

    def state_dict(self) -> dict[str, Any]:
        """litdata's own."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there at the next `iter`, wherever the store now is."""
        here = {"input_dir_path": self._dataset.input_dir.path, "input_dir_url": self._dataset.input_dir.url}
        self._loader.load_state_dict({**state_dict, "dataset": {**state_dict["dataset"], **here}})
        seen: int = state_dict["dataset"]["sample_in_epoch"]
        self._resuming = self._loader.restore and seen < len(self) * self._windows_per_batch

    def __len__(self) -> int:
        return len(self._loader) // self._accumulate * self._accumulate

    def __iter__(self) -> Iterator[Batch]:
        # litdata takes an epoch as ended when it is asked for a batch too many, which Lightning never does: it counts
        self._loader.restore, self._resuming = self._resuming, False
        began = time.perf_counter()
        for batch in self._loader:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()


def _batch(char_counts: npt.NDArray[np.number], windows: list[Any]) -> Batch:
    return make_batch(np.stack([np.asarray(window) for window in windows]), char_counts)
