"""Token ids on disk.

- A `TokenStore` is a folder: the tokenizer, the ids of each split as shards (`train-00000.npy`, uint16 where the
  vocabulary allows, else uint32), and an index, which is written last. Without it a store is half done: it is never read,
  and the next preparation goes on where it stopped, shard by shard.
- Shards are cut from the text alone, so the same ones come out of any number of processes, and of any number of jobs that
  each write a part of them.
- A finished store is plain files that name no place: it may be copied anywhere.
- `TokenArray` reads the shards as one stream. They are memory-mapped, and pages
  that have been read are released from time to time, so a long run over a large text does not appear to fill the memory.

Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lmlight import files
from lmlight.data.reading import TextChunk
from lmlight.data.tokenizer import Tokenizer, from_bytes
from lmlight.errors import UserError

# Raised when the same text and settings would give other files.
LAYOUT = 4
INDEX, TOKENIZER = "index.json", "tokenizer"
# Characters in a shard: about a second's work, which is what an interruption costs.
SHARD_CHARS = 2**23
# What is on its way as Python's objects needs some 40 bytes a token, so so many characters are encoded at a time.
BATCH_CHARS = 2**18
# Files kept open at a time; a system may allow a process no more than a few hundred.
MOST_OPEN = 128
# Bytes of a large store that may be mapped into the process before all of it is let go. A window that is read maps up to
# 64 kB around it.
MOST_MAPPED, MAPPED_BY_A_WINDOW = 2**27, 2**16


class TokenArray:
    """Token ids in several files, and in memory, read as one stream.

    Indexing with a slice or an array of positions gives an array in memory.

    Args:
        parts: `.npy` files and arrays, in order.
        lengths: how many ids each has.
        dtype: of all of them.
    """

    def __init__(
        self, parts: Sequence[Path | npt.NDArray[np.integer]], lengths: Sequence[int], dtype: npt.DTypeLike
    ) -> None:
        self.parts, self.dtype = list(parts), np.dtype(dtype)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._open: OrderedDict[int, npt.NDArray[np.integer]] = OrderedDict()
        self._offsets: dict[int, int] = {}  # where the ids begin in each file
        self._mapped = 0
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, which: slice | npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            assert step == 1, "a stretch of the stream"
            return self._stretch(start, stop)
        found = np.empty(which.shape, self.dtype)
        parts = np.searchsorted(self._ends, which, side="right")
        for number in np.unique(parts):
            here = parts == number
            found[here] = self._part(int(number))[which[here] - self._begin(int(number))]
        self._let_go(MAPPED_BY_A_WINDOW * (len(which) if which.ndim > 1 else which.size))
        return found

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.integer]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def before(self, ids: npt.NDArray[np.integer]) -> TokenArray:
        """The stream with some ids in front of it."""
        return TokenArray([ids.astype(self.dtype), *self.parts], [len(ids), *self.lengths], self.dtype)

    def counts(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """(vocab_size,) how often each id occurs."""
        total = np.zeros(vocab_size, np.int64)
        for number in range(len(self.parts)):
            part = self._part(number)
            for start in range(0, len(part), BATCH_CHARS):
                total += np.bincount(part[start : start + BATCH_CHARS], minlength=vocab_size)
            self._let_go(part.nbytes)
        return total

    def fingerprint(self) -> str:
        """The SHA-256 of all ids; computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for number in range(len(self.parts)):
                part = self._part(number)
                digest.update(np.ascontiguousarray(part).data)
                self._let_go(part.nbytes)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def shard(self, number: int) -> npt.NDArray[np.integer]:
        """The ids of one part, in memory."""
        found = np.array(self._part(number))
        self._let_go(found.nbytes)
        return found

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many ids each part has."""
        return np.diff(self._ends, prepend=0)

    def _stretch(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        found = np.empty(max(0, stop - start), self.dtype)
        position = start
        while position < stop:
            number = int(np.searchsorted(self._ends, position, side="right"))
            end, begin = min(stop, int(self._ends[number])), self._begin(number)
            found[position - start : end - start] = self._part(number)[position - begin : end - begin]
            position = end
        self._let_go(found.nbytes + MAPPED_BY_A_WINDOW)
        return found

    def _begin(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _part(self, number: int) -> npt.NDArray[np.integer]:
        part = self.parts[number]
        if not isinstance(part, Path):
            return part
        if number not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)
            # A batch from all over a large text maps a dozen shards afresh, and numpy's own ways take longer than all else.
            if number not in self._offsets:
                self._offsets[number] = np.load(part, mmap_mode="r").offset
            with part.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int(self._ends[number]) - self._begin(number)
            self._open[number] = np.frombuffer(mapped, self.dtype, length, self._offsets[number])
        self._open.move_to_end(number)
        return self._open[number]

    def _let_go(self, mapped: int) -> None:
        """Unmaps everything once so much has been read; what the system keeps of the files in memory stays there."""
        self._mapped += mapped
        if self._mapped > MOST_MAPPED:
            self._open.clear()
            self._mapped = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_mapped": 0}  # another process maps the files itself


class TokenStore:
    """The encoded splits of a corpus, memory-mapped.

    Attributes:
        folder: where it is.
        ids: of each split.
        chars: the number of characters in each split's text.
        tokenizer: what encoded them.
        about: what it was made of: see `write`.
        streamed: where the training text lies in chunks to be streamed, how many tokens it has; `ids` then has its end.

    Args:
        folder: where `write` put it, or a copy of that.
        fingerprint: names all that the ids depend on (text, split, tokenizer); None takes whatever store is there.

    Raises:
        UserError: the folder holds another store, a damaged one, one that is not finished, or another version's.
    """

    def __init__(self, folder: Path, fingerprint: str | None = None) -> None:
        self.folder = folder
        remedy = "delete that folder" if fingerprint else "copy it again, or prepare the text again"
        if not TokenStore.finished(folder):
            raise UserError(f"the tokens in '{folder}' are not finished (there is no {INDEX}): {remedy}")
        try:
            index = json.loads((folder / INDEX).read_text("utf-8"))
            if index["layout"] != LAYOUT:
                raise UserError(f"the tokens in '{folder}' are another version's of lmlight: prepare the text again")
            if fingerprint and index["fingerprint"] != fingerprint:
                raise UserError(f"the tokens in '{folder}' are of another text or tokenizer: {remedy}")
            self.tokenizer = from_bytes((folder / TOKENIZER).read_bytes())
            self.about: dict[str, Any] = index["about"]
            self.streamed: int | None = index.get("streamed")
            self.ids: dict[str, TokenArray] = {}
            self.chars: dict[str, int] = {}
            for split, content in index["splits"].items():
                shards = [folder / shard_name(split, number) for number in range(len(content["tokens"]))]
                for file, tokens in zip(shards, content["tokens"]):
                    if _tokens_in(file) != tokens:
                        raise ValueError(f"{file.name} has not its {tokens:,} tokens")
                self.ids[split] = TokenArray(shards, content["tokens"], index["dtype"])
                self.chars[split] = content["chars"]
        except (OSError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the tokens in '{folder}' are damaged ({error}): {remedy}") from None

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens each split has."""
        tokens = {split: len(ids) for split, ids in self.ids.items()}
        return tokens if self.streamed is None else {**tokens, "train": self.streamed}

    def copy(self, target: Path) -> TokenStore:
        """A copy in a folder that is not there yet.

        Raises:
            UserError: it cannot be written, or is there.
        """
        with new_folder(target) as folder:
            for file in self.folder.iterdir():
                if file.is_file() and not file.name.startswith("."):
                    shutil.copyfile(file, folder / file.name)
        return TokenStore(target)

    @staticmethod
    def finished(folder: Path) -> bool:
        """Whether there is a whole store in a folder."""
        return (folder / INDEX).exists()

    @staticmethod
    def tokenizer_of(folder: Path) -> Tokenizer | None:
        """The tokenizer of a store that may be half done."""
        try:
            return from_bytes((folder / TOKENIZER).read_bytes())
        except (OSError, ValueError):
            return None

    @staticmethod
    def write(
        folder: Path,
        fingerprint: str,
        texts: Mapping[str, Iterable[TextChunk]],
        tokenizer: Tokenizer,
        about: Mapping[str, Any] = {},
        size: int = 0,
        processes: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> bool:
        """Writes a store, or what is missing of it; where another process was first, its store stays.

        A shard is written beside its place, flushed and renamed, so what is there is whole. Several processes may write
        one store: they write the same.

        Args:
            folder: where it is to appear.
            fingerprint: what `TokenStore(folder, fingerprint)` will ask for.
            texts: name of each split to its text.
            tokenizer: encodes them, unless another process has put its own there first.
            about: what a person, or `TextDataModule`, would want to know of it; plain values.
            size: of all texts, in bytes, for the progress bar; 0 shows none.
            processes: that encode, if there is more than one shard; None is one for each core.
            part: (k, n) writes each n-th shard, from the k-th on: the share of one of n jobs. All read all of the text.

        Returns:
            whether the store is whole; else shards of other parts are missing.

        Raises:
            UserError: see `Tokenizer.encode`; nothing is left behind, but for what other parts may still need.
            OSError: the disk is full, or the folder cannot be written; the shards that are finished stay.
        """
        if TokenStore.finished(folder):
            return True
        folder.mkdir(parents=True, exist_ok=True)
        try:
            published = _publish(folder / TOKENIZER, tokenizer.to_bytes())
            if published != tokenizer.to_bytes():  # training rounds otherwise on another kind of machine
                try:
                    tokenizer = from_bytes(published)
                except ValueError as error:
                    raise UserError(f"the tokens in '{folder}' are damaged ({error}): start again") from None
            dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
            encoder = _Encoder(tokenizer, dtype, processes or _cores())
            bar = tqdm(
                total=size,
                desc="encoding",
                unit="B",
                unit_scale=True,
                delay=2,
                smoothing=0,  # shards come in bursts, as many as there are processes: only their mean tells the time left
                disable=None if size else True,
                leave=False,
            )
            numbers = count()
            with encoder, bar:
                shards = {
                    split: _write_split(
                        folder, split, passages, encoder, bar, lambda: next(numbers) % part[1] == part[0]
                    )
                    for split, passages in texts.items()
                }
            splits: dict[str, dict[str, Any]] = {
                split: {"chars": sum(chars for _, chars in those), "tokens": [_tokens_in(path) for path, _ in those]}
                for split, those in shards.items()
            }
            if any(tokens is None for split in splits.values() for tokens in split["tokens"]):
                return False
            index = {"layout": LAYOUT, "fingerprint": fingerprint, "dtype": dtype, "splits": splits, "about": about}
            _publish(folder / INDEX, json.dumps(index, indent=1).encode())
            return True
        except (UserError, AssertionError):  # there is no going on with it
            if part[1] == 1 and not TokenStore.finished(folder):
                _discard(folder)
            raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place at the end, whole; if anything fails, not at all.

    Raises:
        UserError: something is at its place, or it cannot be written.
    """
    if target.exists():
        raise UserError(f"'{target}' is there already: pass a folder that is not")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_folder(target) as folder:
            yield folder
    except OSError as error:
        raise UserError(f"folder '{target}' cannot be written ({error.strerror or error}): pass another") from None


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.npy"


def _discard(folder: Path) -> None:
    """Deletes an unfinished store: what `write` has made, and the folder only if nothing else is in it."""
    with suppress(OSError):
        for file in list(folder.iterdir()):
            if re.fullmatch(rf"{TOKENIZER}|\w+-\d{{5,}}\.npy|\.({TOKENIZER}|\w+-\d{{5,}}\.npy)-\w+", file.name):
                file.unlink(missing_ok=True)
        folder.rmdir()


def _write_split(
    folder: Path, split: str, passages: Iterable[TextChunk], encoder: _Encoder, bar: Any, ours: Callable[[], bool]
) -> list[tuple[Path, int]]:
    """Writes those shards of a split that are ours and not there; the place and the characters of all of them."""
    shards: list[tuple[Path, int]] = []
    pending: deque[tuple[Future[None], int]] = deque()

    def collect(most: int) -> None:
        while len(pending) > most:
            future, size = pending.popleft()
            future.result()
            bar.update(size)

    for number, batch in enumerate(chain(batches(passages, SHARD_CHARS), [[]])):
        if number and not batch:  # a split without text has one shard without tokens
            break
        path = folder / shard_name(split, number)
        chars, size = _measure(batch)
        shards.append((path, chars))
        if not ours():
            bar.total = (bar.total or 0) - size
        elif path.exists():
            collect(most=0)
            if not bar.disable:  # what was done before counts neither as speed nor as time
                bar.initial += size
                bar.n += size
                bar.unpause()
        else:
            pending.append((encoder.submit(path, batch), size))
            collect(most=2 * encoder.processes)
    collect(most=0)
    return shards


def _measure(passages: Sequence[TextChunk]) -> tuple[int, int]:
    """Characters, and their bytes in UTF-8."""
    return sum(len(text) for text, _ in passages), sum(len(text.encode()) for text, _ in passages)


def batches(passages: Iterable[TextChunk], chars: int) -> Iterator[list[TextChunk]]:
    """Passages, by so many characters or a little more."""
    batch, size = list[TextChunk](), 0
    for passage in passages:
        batch.append(passage)
        size += len(passage.text)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(tokenizer: Tokenizer, passages: Iterable[TextChunk], dtype: npt.DTypeLike) -> npt.NDArray[np.integer]:
    """The ids of passages of text.

    Raises:
        UserError: see `Tokenizer.encode`.
    """
    done = [np.empty(0, dtype)]
    for batch in batches(passages, BATCH_CHARS):
        ids = tokenizer.encode_chunks(batch)
        done.append(np.array(ids, dtype=dtype))
        if tokenizer.lossless:  # counted everywhere; decoded, which takes half as long as encoding, in a sample
            assert tokenizer.char_counts[done[-1]].sum() == sum(len(passage.text) for passage in batch)
            assert len(done) > 2 or tokenizer.decode(ids) == "".join(passage.text for passage in batch)
    return np.concatenate(done)


def decode(tokenizer: Tokenizer, ids: npt.NDArray[np.integer]) -> Iterator[TextChunk]:
    """The passages of text that ids were made from, one for each document."""
    ends = ids == (-1 if tokenizer.eos_id is None else tokenizer.eos_id)
    for document in np.split(ids, np.flatnonzero(ends) + 1):
        if len(document):
            yield TextChunk(tokenizer.decode(document.tolist()), document[-1] == tokenizer.eos_id)


def _write_shard(tokenizer: Tokenizer, dtype: str, path: Path, passages: Sequence[TextChunk]) -> None:
    with files.whole(path, shared=True) as beside, beside.open("wb") as file:
        np.save(file, encode(tokenizer, passages, dtype))


def _tokens_in(path: Path) -> int | None:
    """How many tokens a shard has; None if it is not there."""
    try:
        return len(np.load(path, mmap_mode="r"))
    except FileNotFoundError:
        return None


def _publish(path: Path, content: bytes) -> bytes:
    """Puts a file in its place, unless one is there; what is there then. Of several processes the first wins."""
    if not path.exists():
        with files.whole(path, shared=True) as beside:
            beside.write_bytes(content)
    return path.read_bytes()


# Encoding in several processes: SentencePiece's own threads gain nothing from Python, for turning ids into Python's
# objects holds the lock that they all need (benchmarks/data.py).


class _Encoder:
    """Writes shards: full ones in other processes, so that a small text does not wait for them to start."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, processes: int) -> None:
        self._tokenizer, self._dtype, self.processes = tokenizer, dtype, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, path: Path, passages: list[TextChunk]) -> Future[None]:
        if self.processes == 1 or sum(len(passage.text) for passage in passages) < SHARD_CHARS:
            future: Future[None] = Future()
            _write_shard(self._tokenizer, self._dtype, path, passages)
            future.set_result(None)
            return future
        if self._pool is None:
            self._pool = pool(self.processes, _begin, self._tokenizer.to_bytes(), self._dtype)
        with nameless_main():
            return self._pool.submit(_write_shard_here, path, passages)


def pool(processes: int, initializer: Callable[..., object], *arguments: object) -> ProcessPoolExecutor:
    """Processes that end with this one, however it ends. Submit to them inside `nameless_main`."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _in_process, (initializer, arguments))


def _in_process(initializer: Callable[..., object], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    initializer(*arguments)


@contextmanager
def nameless_main() -> Iterator[None]:
    """A process that is started here does not import what was typed to start this one: it has no need of it, and a script
    that has no `if __name__ == "__main__"` would run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_here: tuple[Tokenizer, str] | None = None  # of a process that encodes


def _begin(tokenizer: bytes, dtype: str) -> None:
    global _here
    _here = from_bytes(tokenizer), dtype


def _write_shard_here(path: Path, passages: list[TextChunk]) -> None:
    assert _here is not None
    _write_shard(*_here, path, passages)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
