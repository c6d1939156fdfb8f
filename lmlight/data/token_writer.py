"""Token ids on disk: writing.

- Shards are cut by characters alone, so any number of processes writes the same files.
- A shard is written beside its final name, flushed and renamed. An interrupted call loses the shards in progress, and the
  next one continues with the first missing shard.
- Full shards are encoded in worker processes. SentencePiece's own threads do not help, because turning ids into Python
  objects holds the global interpreter lock (benchmarks/data.py).

Free of torch.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lmlight import files
from lmlight.data.reading import TextChunk
from lmlight.data.token_store import FORMAT_VERSION, INDEX, TOKENIZER, Tokens, TokenStore, shard_name, tokens_in
from lmlight.data.tokenizer import Tokenizer, deserialize, serialize
from lmlight.data.workers import WorkerPool, cpu_count
from lmlight.errors import UserError

SHARD_CHARS = 2**23  # about one second of encoding, which is what an interruption costs
BATCH_CHARS = 2**18  # token ids as Python ints cost about 40 bytes each, so encode this many characters at a time


def write_store(
    folder: Path,
    fingerprint: str,
    texts: Mapping[str, Iterable[TextChunk]],
    tokenizer: Tokenizer,
    metadata: Mapping[str, Any] = {},
    size: int = 0,
    processes: int | None = None,
) -> None:
    """Writes a token store, or the missing shards of an unfinished one. Several processes may write the same store.

    Args:
        folder: where the store appears. A finished store is left as it is.
        fingerprint: identifies everything that the ids depend on (text, split, tokenizer).
        texts: the text of each split.
        tokenizer: encodes the text, unless the unfinished store already has a tokenizer.
        metadata: plain values for people and for `CorpusSpec`.
        size: bytes of all texts, for the progress bar; 0 shows none.
        processes: worker processes for texts of more than one shard; None is one per core.

    Raises:
        UserError: see `Tokenizer.encode`; the unfinished store is deleted.
        OSError: the disk is full, or the folder is not writable; finished shards stay.
    """
    if TokenStore.is_finished(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        published = _publish(folder / TOKENIZER, serialize(tokenizer))
        if published != serialize(tokenizer):  # another machine was first, whose training rounds differently
            try:
                tokenizer = deserialize(published)
            except ValueError as error:
                raise UserError(f"the tokens in '{folder}' are damaged ({error}): prepare the text again") from None
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        pool = WorkerPool(processes or cpu_count(), _start_worker, serialize(tokenizer), dtype)
        # shards finish in bursts, so only their mean speed (smoothing=0) predicts the remaining time
        options = {"unit": "B", "unit_scale": True, "delay": 2, "leave": False, "smoothing": 0}
        try:
            with tqdm(desc="encoding", total=size, disable=None if size else True, **options) as bar:
                splits = {
                    split: _write_split(folder, split, chunks, tokenizer, dtype, pool, bar)
                    for split, chunks in texts.items()
                }
        finally:
            pool.shutdown()
        index = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "dtype": dtype}
        _publish(folder / INDEX, json.dumps({**index, "splits": splits, "metadata": metadata}, indent=1).encode())
    except (UserError, AssertionError):  # a second call would fail in the same way
        if not TokenStore.is_finished(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a finished or unfinished store; None if it has none."""
    try:
        return deserialize((folder / TOKENIZER).read_bytes())
    except (OSError, ValueError):
        return None


def _write_split(
    folder: Path, split: str, chunks: Iterable[TextChunk], tokenizer: Tokenizer, dtype: str, pool: WorkerPool, bar: Any
) -> dict[str, Any]:
    """Writes the missing shards of a split and returns its entry in the index."""
    paths, chars = list[Path](), 0
    pending: deque[tuple[Future[None], int]] = deque()
    for number, batch in enumerate(chain(_batches(chunks, SHARD_CHARS), [[]])):
        if number and not batch:  # a split without text has one empty shard
            break
        paths.append(folder / shard_name(split, number))
        shard_chars = sum(len(chunk.text) for chunk in batch)
        size = sum(len(chunk.text.encode()) for chunk in batch)
        chars += shard_chars
        if paths[-1].exists():
            bar.update(size)
        elif pool.processes == 1 or shard_chars < SHARD_CHARS:  # a small text does not wait for processes to start
            _write_shard(tokenizer, dtype, paths[-1], batch)
            bar.update(size)
        else:
            pending.append((pool.submit(_write_shard_in_worker, paths[-1], batch), size))
        while len(pending) > 2 * pool.processes:
            _wait(pending, bar)
    while pending:
        _wait(pending, bar)
    return {"chars": chars, "tokens": [tokens_in(path) for path in paths]}


def _wait(pending: deque[tuple[Future[None], int]], bar: Any) -> None:
    future, size = pending.popleft()
    future.result()
    bar.update(size)


def _write_shard(tokenizer: Tokenizer, dtype: str, path: Path, chunks: Sequence[TextChunk]) -> None:
    with files.whole(path, shared=True) as beside, beside.open("wb") as file:
        np.save(file, _encode(tokenizer, chunks, dtype))


def _encode(tokenizer: Tokenizer, chunks: Iterable[TextChunk], dtype: str) -> Tokens:
    encoded = [np.empty(0, dtype)]
    for batch in _batches(chunks, BATCH_CHARS):
        ids = tokenizer.encode_chunks(batch)
        encoded.append(np.array(ids, dtype=dtype))
        if tokenizer.lossless:  # characters are counted in every batch; the first two are decoded, which takes longer
            assert tokenizer.char_counts[encoded[-1]].sum() == sum(len(chunk.text) for chunk in batch)
            assert len(encoded) > 2 or tokenizer.decode(ids) == "".join(chunk.text for chunk in batch)
    return np.concatenate(encoded)


def _batches(chunks: Iterable[TextChunk], chars: int) -> Iterator[list[TextChunk]]:
    """Groups chunks into batches of at least `chars` characters; the last one may be smaller."""
    batch, size = list[TextChunk](), 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.text)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _publish(path: Path, content: bytes) -> bytes:
    """Writes a file unless it exists, and returns its content: the first of several processes wins."""
    if not path.exists():
        with files.whole(path, shared=True) as beside:
            beside.write_bytes(content)
    return path.read_bytes()


_worker_state: tuple[Tokenizer, str] | None = None


def _start_worker(tokenizer: bytes, dtype: str) -> None:
    global _worker_state
    _worker_state = deserialize(tokenizer), dtype


def _write_shard_in_worker(path: Path, chunks: list[TextChunk]) -> None:
    assert _worker_state is not None
    _write_shard(*_worker_state, path, chunks)
