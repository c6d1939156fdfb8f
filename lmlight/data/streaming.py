"""Training from object storage: a token store whose training text is a litdata dataset, read during training.

- `train/` holds the training text in chunks for litdata's `TokensLoader`. The folder around it is also a token store, with
  only the last two training shards: the context of the first validation token, and text for the train/val gap.
- litdata fetches and caches the chunks. `WindowSource` orders the windows.

litdata is an extra, imported on use.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from lmlight.data.token_store import INDEX, TokenArray, Tokens, TokenStore, shard_name
from lmlight.data.windows import WindowSource
from lmlight.errors import UserError, missing_extra, reason

CHUNKS = "train"
CHUNK_BYTES = 2**26  # litdata's recommendation for object storage
PAGE_TOKENS = 2**12  # tokens that are read at a time; an incomplete last page is left out
KEPT_SHARDS = 2


def litdata() -> ModuleType:
    """Import litdata; raise a `UserError` if it is not installed."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask the package index at every start
    try:
        import litdata
    except ImportError:
        raise missing_extra("streaming needs the litdata package", "streaming") from None
    return litdata


def write(store: TokenStore, target: Path) -> TokenStore:
    """Writes a streamed store to the new folder `target`, which appears when it is complete."""
    package, train = litdata(), store.ids["train"]
    if store.streamed is not None:
        raise UserError(f"'{store.folder}' is already in litdata's format: copy that folder")
    if not store.tokenizer.lossless:  # its character counts need the occurrences of each id in the whole text
        raise UserError(
            "--format litdata needs a lossless tokenizer: leave out --data.tokenizer.lossless false, or pass another one"
        )
    if len(train) < PAGE_TOKENS:
        raise UserError(
            f"--format litdata needs {PAGE_TOKENS:,} training tokens, but this text has {len(train):,}: leave out --format"
        )
    with store.copied(target, leave_out="train-*.npy") as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own defaults
            package.optimize(
                partial(_pages, page_tokens=PAGE_TOKENS),
                inputs=[train],
                output_dir=str(folder / CHUNKS),
                chunk_bytes=CHUNK_BYTES,
                item_loader=package.TokensLoader(),
                num_workers=1,  # more would change the chunks, and the work is I/O
                keep_data_ordered=True,
                verbose=False,
            )
        for number, shard in enumerate(train.shards[-KEPT_SHARDS:]):
            assert isinstance(shard, Path)
            shutil.copyfile(shard, folder / shard_name("train", number))
        index = json.loads((store.folder / INDEX).read_text("utf-8"))
        index["splits"]["train"]["tokens"] = train.lengths[-KEPT_SHARDS:]
        chunks = json.loads((folder / CHUNKS / "index.json").read_text("utf-8"))["chunks"]
        pages = [chunk["dim"] // PAGE_TOKENS for chunk in chunks]
        index["streamed"] = {"pages": pages, "page_tokens": PAGE_TOKENS, "fingerprint": train.fingerprint}
        (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
    return TokenStore(target)


def _pages(ids: TokenArray, page_tokens: int) -> Iterator[Tokens]:
    for start in range(0, len(ids), page_tokens):
        yield ids[start : start + page_tokens]


def streamed_windows(store: TokenStore, place: str, block_size: int, seed: int, order: str) -> WindowSource:
    """Windows of the streamed store at `place`, a folder or a URL; for the other arguments see `WindowSource`.

    The store's chunks are the shards. The next one is fetched while one is in use.
    """
    assert store.streamed is not None
    page_tokens, pages = store.streamed["page_tokens"], store.streamed["pages"]
    ends, package = np.cumsum(pages).tolist(), litdata()
    with _readable(place):
        loader = package.TokensLoader(block_size=page_tokens)
        dataset = package.StreamingDataset(f"{place.rstrip('/')}/{CHUNKS}", item_loader=loader)

    def load(epoch: int, chunk: int) -> Tokens:
        with _readable(place):
            return np.concatenate([dataset[page] for page in range(ends[chunk] - pages[chunk], ends[chunk])])

    lengths = [page_tokens * n for n in pages]
    return WindowSource(load, lengths, block_size, seed, order, ThreadPoolExecutor(1), ahead=1)


@contextmanager
def _readable(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every driver raises its own
        raise UserError(
            f"the chunks in '{place}' cannot be read ({reason(error)}): copy or prepare them again"
        ) from None
