"""Token ids on disk, and windows of them as batches.

- A `TokenStore` is a folder: the tokenizer, the ids of each split as a memory-mapped `.npy` file (uint16 where the
  vocabulary allows), and an index with a fingerprint of all that they depend on. It appears whole or not at all.
- A batch carries the characters that each target stands for, so the loss needs no tokenizer and figures of different
  vocabularies compare.

Axes: B windows, T positions. Free of lightning.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lmlight.data.corpus import Piece
from lmlight.data.tokenizer import Tokenizer, from_bytes
from lmlight.errors import UserError

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


class TokenStore:
    """The encoded splits of a corpus, memory-mapped.

    Attributes:
        ids: of each split.
        chars: the number of characters in each split's text.
        tokenizer: what encoded them.

    Args:
        folder: where `write` put it.
        fingerprint: names all that the ids depend on (text, split, tokenizer).

    Raises:
        UserError: the folder holds another store, or a damaged one.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        try:
            index = json.loads((folder / "index.json").read_text("utf-8"))
            if index["fingerprint"] != fingerprint:
                raise UserError(f"the tokens in '{folder}' are of another text or tokenizer: delete that folder")
            self.ids = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in index["chars"]}
            self.chars: dict[str, int] = index["chars"]
            self.tokenizer = from_bytes((folder / "tokenizer").read_bytes())
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the tokens in '{folder}' are damaged ({error}): delete that folder") from None

    @staticmethod
    def write(
        folder: Path,
        fingerprint: str,
        texts: Mapping[str, Iterable[Piece]],
        tokenizer: Tokenizer,
        about: Mapping[str, Any] = {},
    ) -> None:
        """Publishes a store: written beside its place, then renamed; where another process was first, its store stays.

        Args:
            folder: where it is to appear.
            fingerprint: what `TokenStore(folder, fingerprint)` will ask for.
            texts: name of each split to its text.
            tokenizer: encodes them.
            about: what a person would want to know of it.
        """
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            chars = {}
            for split, pieces in texts.items():
                ids, chars[split] = encode(tokenizer, pieces, dtype)
                np.save(beside / f"{split}.npy", ids)
            (beside / "tokenizer").write_bytes(tokenizer.to_bytes())
            index = {"fingerprint": fingerprint, "chars": chars, "about": about}
            (beside / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
            beside.rename(folder)
        except OSError:
            if not (folder / "index.json").exists():
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def encode(tokenizer: Tokenizer, pieces: Iterable[Piece], dtype: npt.DTypeLike) -> tuple[npt.NDArray[np.integer], int]:
    """The ids of some pieces of text, and the number of their characters.

    Raises:
        UserError: see `Tokenizer.encode`.
    """
    done, chars = [np.empty(0, dtype)], 0
    for batch in _batches(pieces):
        ids = tokenizer.encode_pieces(batch)
        text = "".join(piece.text for piece in batch)
        if tokenizer.lossless and tokenizer.decode(ids) != text:
            raise RuntimeError("a text does not survive the tokenizer, which says that it is lossless")
        done.append(np.array(ids, dtype=dtype))
        chars += len(text)
    return np.concatenate(done), chars


def _batches(pieces: Iterable[Piece], chars: int = 2**18) -> Iterator[list[Piece]]:
    """Pieces by the quarter of a million characters: what is on its way as Python's objects needs some 40 bytes for each."""
    batch, size = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def decode(tokenizer: Tokenizer, ids: npt.NDArray[np.integer]) -> Iterator[Piece]:
    """The pieces of text that ids were made from, one for each document."""
    ends = ids == (-1 if tokenizer.end_of_text is None else tokenizer.end_of_text)
    for document in np.split(ids, np.flatnonzero(ends) + 1):
        if len(document):
            yield Piece(tokenizer.decode(document.tolist()), document[-1] == tokenizer.end_of_text)


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
        ids: npt.NDArray[np.integer],
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


def as_batch(batch: Any) -> Batch:
    """Collates nothing: `Windows` gives whole batches. (A function with a name, so that workers can be spawned.)"""
    return batch
