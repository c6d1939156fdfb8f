"""Token ids on disk: reading. `token_writer` writes them.

- A token store is a folder with the tokenizer, the ids of each split in shards (`train-00000.npy`; uint16, or uint32 above
  65,536 ids), and `index.json`, which is written last. A folder without an index is unfinished, and never trained on.
- No file is looked up by an absolute path, so a finished store can be copied anywhere.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmlight import files
from lmlight.data.tokenizer import deserialize
from lmlight.errors import UserError, reason

# Part of every fingerprint; incremented when the same text and settings would give other files.
FORMAT_VERSION = 7
INDEX, TOKENIZER = "index.json", "tokenizer"

Tokens = npt.NDArray[np.integer]


class TokenArray:
    """Token ids in `.npy` files or in memory, read as one array of shape (N,).

    Indexing with a slice or an array of positions returns an array in memory.

    Args:
        shards: files and arrays, in order.
        lengths: the number of ids in each shard.
        dtype: of all shards.
    """

    def __init__(self, shards: Sequence[Path | Tokens], lengths: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.shards, self.lengths, self.dtype = list(shards), list(lengths), np.dtype(dtype)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, index: slice | npt.NDArray[np.integer]) -> Tokens:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        tokens = np.empty(index.shape, self.dtype)
        shard_of = np.searchsorted(self._ends, index, side="right")
        for n in np.unique(shard_of).tolist():
            here = shard_of == n
            tokens[here] = self.shard(n)[index[here] - self._ends[n]]  # negative: from the shard's end
        return tokens

    def shard(self, n: int) -> Tokens:
        """The ids of one shard; those in a file are memory-mapped."""
        shard = self.shards[n]
        if not isinstance(shard, Path):
            return shard
        # Mapped anew on every access, so pages that were read before do not count as this process's memory, and no files
        # stay open. It takes 20 µs, `np.load` 120 µs.
        try:
            file = shard.open("rb")
        except FileNotFoundError:
            remedy = "start again, and resume an interrupted run with --ckpt_path last"
            raise UserError(f"the tokens in '{shard.parent}' were deleted while in use: {remedy}") from None
        with file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = len(mapped) - self.lengths[n] * self.dtype.itemsize
        return np.frombuffer(mapped, self.dtype, offset=header)

    def prepend(self, tokens: Tokens) -> TokenArray:
        """`tokens`, then these ids."""
        return TokenArray([tokens.astype(self.dtype), *self.shards], [len(tokens), *self.lengths], self.dtype)

    def counts(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """(vocab_size,) occurrences of each id."""
        shards = map(self.shard, range(len(self.shards)))
        return sum((np.bincount(shard, minlength=vocab_size) for shard in shards), np.zeros(vocab_size, np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all ids."""
        digest = hashlib.sha256()
        for n in range(len(self.shards)):
            digest.update(np.ascontiguousarray(self.shard(n)).data)
        return digest.hexdigest()


class TokenStore:
    """The encoded splits of a corpus.

    Attributes:
        ids: the ids of each split.
        chars: the number of characters in each split's text.
        tokenizer: the tokenizer that encoded them.
        metadata: see `token_writer.write_store`.
        streamed: describes the chunks of a training text that is streamed; `ids["train"]` is then only its end.

    Args:
        folder: a finished store.
        fingerprint: the fingerprint passed to `write_store`; None accepts any store.

    Raises:
        UserError: the store is missing, unfinished, damaged, of another format version, or made from
            another text or tokenizer.
    """

    def __init__(self, folder: Path, fingerprint: str | None = None) -> None:
        self.folder = folder
        remedy = "delete that folder" if fingerprint else "copy it again, or prepare the text again"
        tokens = f"the tokens in '{folder}' are"
        if not TokenStore.is_finished(folder):
            raise UserError(f"{tokens} incomplete (there is no {INDEX}): {remedy}")
        try:
            index = json.loads((folder / INDEX).read_text("utf-8"))
            if index["format_version"] != FORMAT_VERSION:
                raise UserError(f"{tokens} from another version of lmlight: prepare the text again")
            if fingerprint and index["fingerprint"] != fingerprint:
                raise UserError(f"{tokens} from another text or tokenizer: {remedy}")
            self.tokenizer = deserialize((folder / TOKENIZER).read_bytes())
            self.metadata: dict[str, Any] = index["metadata"]
            self.streamed: dict[str, Any] | None = index.get("streamed")
            self.chars: dict[str, int] = {split: content["chars"] for split, content in index["splits"].items()}
            self.ids: dict[str, TokenArray] = {}
            for split, content in index["splits"].items():
                shards = [folder / shard_name(split, number) for number in range(len(content["tokens"]))]
                for file, length in zip(shards, content["tokens"]):
                    if tokens_in(file) != length:
                        raise ValueError(f"{file.name} does not have {length:,} tokens")
                self.ids[split] = TokenArray(shards, content["tokens"], index["dtype"])
        except UserError:
            raise
        except Exception as error:  # anything can be wrong in a damaged file
            raise UserError(f"{tokens} damaged ({error}): {remedy}") from None

    @property
    def tokens(self) -> dict[str, int]:
        """The number of tokens in each split."""
        tokens = {split: len(ids) for split, ids in self.ids.items()}
        if self.streamed:
            tokens["train"] = sum(self.streamed["pages"]) * self.streamed["page_tokens"]
        return tokens

    @property
    def train_fingerprint(self) -> str:
        """Identifies the training tokens."""
        # differs from a stored copy's, whose windows come in another order
        return f"streamed {self.streamed['fingerprint']}" if self.streamed else self.ids["train"].fingerprint

    @cached_property
    def eval_ids(self) -> dict[str, TokenArray]:
        """The ids of each evaluation split, preceded by the last training token as context."""
        context = self.ids["train"][-1:]
        return {split: ids.prepend(context) for split, ids in self.ids.items() if split != "train"}

    @cached_property
    def char_counts(self) -> dict[str, npt.NDArray[np.number]]:
        """(V,) characters per id in each split. For a lossy tokenizer, scaled to add up to the length of the text."""
        counts = self.tokenizer.char_counts
        if self.tokenizer.lossless:
            return dict.fromkeys(self.ids, counts)
        scales = {split: self.chars[split] / (ids.counts(len(counts)) @ counts) for split, ids in self.ids.items()}
        return {split: (counts * scale).astype(np.float32) for split, scale in scales.items()}  # MPS has no float64

    @contextmanager
    def copied(self, target: Path, leave_out: str = "") -> Iterator[Path]:
        """A copy of the folder without hidden files or files that match the pattern `leave_out`.

        It appears at `target` if the block does not raise.

        Raises:
            UserError: `target` exists, or cannot be written.
        """
        if target.exists():
            raise UserError(f"'{target}' exists: pass a new folder")
        ignored = shutil.ignore_patterns(".*", leave_out)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.whole_folder(target) as folder:
                # without permissions: copies of read-only files could not be opened to flush them
                shutil.copytree(self.folder, folder, ignore=ignored, copy_function=shutil.copyfile, dirs_exist_ok=True)
                yield folder
        except OSError as error:
            raise UserError(f"folder '{target}' cannot be written ({reason(error)}): pass another") from None

    def copy(self, target: Path) -> TokenStore:
        """Copies the store to a new folder; raises like `copied`."""
        with self.copied(target):
            pass
        return TokenStore(target)

    @staticmethod
    def is_finished(folder: Path) -> bool:
        """Whether a folder holds a finished store."""
        return (folder / INDEX).exists()


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.npy"


def tokens_in(shard: Path) -> int:
    """The number of tokens in a shard's file."""
    return len(np.load(shard, mmap_mode="r"))
