"""Token ids on disk: writing.

- Shards are cut by characters alone, so any number of processes writes the same files.
- An interrupted call loses the shards in progress, and the next one continues with the first missing shard.
- Full shards are encoded in worker processes. SentencePiece's own threads do not help, because turning ids into Python
  objects holds the global interpreter lock (benchmarks/data.py).
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lmlight import files
from lmlight.data.reading import TextChunk
from lmlight.data.token_store import FORMAT_VERSION, INDEX, TOKENIZER, TokenStore, shard_name, tokens_in
from lmlight.data.tokenizer import Tokenizer, deserialize, serialize
from lmlight.data.workers import cpu_count, killed_workers_reported, process_pool
from lmlight.errors import UserError
from lmlight.user_code import full_name

SHARD_CHARS = 2**23  # at most about a second of encoding, the cost of an interruption
BATCH_CHARS = 2**18  # token ids as Python ints cost about 40 bytes each, so encode this many characters at a time


def write_store(
    folder: Path,
    fingerprint: str,
    texts: Mapping[str, Iterable[TextChunk]],
    tokenizer: Tokenizer,
    metadata: Mapping[str, Any] = {},
    chars: int = 0,
    processes: int | None = None,
) -> None:
    """Writes a token store, or the missing shards of an unfinished one. Several processes may write the same store.

    Args:
        folder: where the store appears. A finished store is left as it is.
        fingerprint: identifies everything that the ids depend on (text, split, tokenizer).
        texts: the text of each split.
        tokenizer: encodes the text, unless the unfinished store already has a tokenizer.
        metadata: plain values: `corpus`, `vocab_size` and `settings`.
        chars: characters of all texts, for the progress bar; 0 shows none.
        processes: worker processes for texts of more than one shard; None is one per core.

    Raises:
        UserError: the text cannot be read or encoded, or a worker process was killed. Unless an OSError or a killed process
            is the cause, the unfinished store is deleted.
        OSError: the disk is full, or the folder is not writable; finished shards stay.
    """
    if TokenStore.is_finished(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    processes = processes or cpu_count()
    pool = process_pool(processes) if processes > 1 else None
    # shards finish in bursts, so only their mean speed (smoothing=0) predicts the remaining time
    options = {"unit": "char", "unit_scale": True, "delay": 2, "leave": False, "smoothing": 0}
    try:
        tokenizer = deserialize(_publish(folder / TOKENIZER, serialize(tokenizer)))
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        write, splits = partial(_write_shard, tokenizer, dtype), {}
        with tqdm(desc="encoding", total=chars, disable=None if chars else True, **options) as bar:
            for split, chunks in texts.items():
                batches = enumerate(_batches(chunks, SHARD_CHARS))
                shards = ((folder / shard_name(split, number), batch) for number, batch in batches)
                written = []
                with killed_workers_reported():
                    for shard in _write_shards(write, shards, pool, 2 * processes if pool else 0):
                        written.append(shard)
                        bar.update(shard[0])
                splits[split] = {"chars": sum(n for n, _ in written), "tokens": [n for _, n in written]}
        index = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "dtype": dtype}
        _publish(folder / INDEX, json.dumps({**index, "splits": splits, "metadata": metadata}, indent=1).encode())
    except ValueError as error:
        is_temporary = isinstance(error.__cause__, (OSError, BrokenExecutor))  # not the text or the tokenizer
        if not is_temporary and not TokenStore.is_finished(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a finished or unfinished store; None if it has none."""
    try:
        return deserialize((folder / TOKENIZER).read_bytes())
    except (OSError, ValueError):
        return None


def _write_shards(
    write: Callable[[Path, list[TextChunk]], tuple[int, int]],
    shards: Iterable[tuple[Path, list[TextChunk]]],
    pool: Executor | None,
    max_pending: int,
) -> Iterator[tuple[int, int]]:
    """Writes full shards in the pool, others in this process; yields each shard's number of characters and tokens."""
    pending = deque[Callable[[], tuple[int, int]]]()
    for path, chunks in shards:
        if pool and _chars(chunks) >= SHARD_CHARS and not path.exists():
            pending.append(pool.submit(write, path, chunks).result)
        else:  # a small text does not wait for processes to start
            pending.append(partial(write, path, chunks))
        while len(pending) > max_pending:
            yield pending.popleft()()
    for result in pending:
        yield result()


def _write_shard(tokenizer: Tokenizer, dtype: str, path: Path, chunks: list[TextChunk]) -> tuple[int, int]:
    if not path.exists():
        encoded = [np.empty(0, dtype)]
        for batch in _batches(chunks, BATCH_CHARS):
            ids = tokenizer.encode_chunks(batch)
            array = np.array(ids, dtype=None if ids else dtype)
            if ids and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= tokenizer.vocab_size):
                limit = f"below the length of char_counts, {tokenizer.vocab_size}"
                raise UserError(f"{type(tokenizer).__name__}.encode must return integers {limit}")
            encoded.append(array.astype(dtype))
            if tokenizer.lossless:
                wrong = ""
                if tokenizer.char_counts[encoded[-1]].sum() != _chars(batch):
                    wrong = "char_counts does not fit"
                # only the first batch, because decoding takes longer
                if len(encoded) == 2 and tokenizer.decode(ids) != "".join(chunk.text for chunk in batch):
                    wrong = "decode does not restore"
                if wrong:
                    name, remedy = type(tokenizer).__name__, "correct the class, or set lossless = False in it"
                    if full_name(type(tokenizer)).startswith("lmlight."):
                        remedy = "pass another tokenizer, because this one is not lossless"
                    raise UserError(f"{name}.{wrong} the text: {remedy}")
        with files.whole(path, shared=True) as beside, beside.open("wb") as file:
            np.save(file, np.concatenate(encoded))
    return _chars(chunks), tokens_in(path)


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


def _chars(chunks: Iterable[TextChunk]) -> int:
    return sum(len(chunk.text) for chunk in chunks)


def _publish(path: Path, content: bytes) -> bytes:
    """Writes a file unless it exists, and returns its content: the first of several processes wins."""
    if not path.exists():
        with files.whole(path, shared=True) as beside:
            beside.write_bytes(content)
    return path.read_bytes()
