"""Subword regularization (Kudo 2018, https://arxiv.org/abs/1804.10959): random segmentations of the training text.

They are sampled here because SentencePiece's own sampling is not reproducible across processes. Here the same
seed and epoch give the same segmentation everywhere.
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from lmlight.data.reading import TextChunk
from lmlight.data.sentencepiece_training import SPACE, UNKNOWN_PENALTY, split_chunks
from lmlight.data.token_store import TokenArray, Tokens
from lmlight.data.tokenizer import SentencePieceTokenizer, Tokenizer
from lmlight.data.windows import WindowSource
from lmlight.data.workers import process_pool
from lmlight.errors import UserError

# Lattices of short words are kept, at most about 15 kB each. In a text without spaces, a word may be a whole line.
MAX_CACHED_WORDS, MAX_CACHED_LENGTH = 30_000, 32

# Pieces do not cross spaces, so a text is sampled word by word.
WORD = re.compile(f"{SPACE}?[^{SPACE}]+|{SPACE}")

# The pieces that may end at one position of a word: their cumulative weights, where they begin, and their ids.
LatticeEdges = tuple[list[float], list[int], list[list[int]]]


@dataclass(frozen=True)
class SubwordSampling:
    """Subword regularization: a new random segmentation of the training text in each epoch.

    Args:
        alpha: exponent of the segmentations' probabilities: 0 is uniform; large values approach the best segmentation.

    Raises:
        UserError: `alpha` is negative or not finite.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise UserError(f"data.subword_sampling.alpha must be finite and at least 0, got {self.alpha}")


class SubwordSampler:
    """Samples segmentations with a unigram model.

    The lattice of all segmentations of a text is a chain of its words' lattices, and those of recently used short words are
    cached. Weights are summed from left to right, and a segmentation is sampled from right to left (forward filtering,
    backward sampling): exactly SentencePiece's distribution.

    Raises:
        UserError: the tokenizer is not a SentencePiece unigram model.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SubwordSampling) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer) or not tokenizer.is_unigram:
            raise UserError(
                "subword_sampling requires a SentencePiece unigram model: set --data.tokenizer.kind unigram, or "
                "--data.subword_sampling null"
            )
        self.tokenizer, self._sampling = tokenizer, sampling
        self._scores = tokenizer.scores()
        self._longest = max(map(len, self._scores))
        self._unknown_score = min(score for _, score in self._scores.values()) - UNKNOWN_PENALTY
        self._cached_lattice = lru_cache(MAX_CACHED_WORDS)(self._lattice)

    def sample(
        self, text: str | Iterable[TextChunk], seed: int, epoch: int, shard: int | None = None
    ) -> npt.NDArray[np.int64]:
        """The ids (N,) of a segmentation of a text, or of its chunks.

        It is a pure function of the text, the run's `seed`, the `epoch` and, for one of several shards, its number `shard`.
        """
        chunks = [TextChunk(text)] if isinstance(text, str) else text
        numbers = f"{seed} {epoch}" if shard is None else f"{seed} {epoch} {shard}"
        uniform = random.Random(f"subword {numbers}").random
        ids: list[int] = []
        for part, separator in zip(*split_chunks(chunks, self.tokenizer.lossless)):
            for word in WORD.findall(self.tokenizer.normalize(part)):
                lattice = self._cached_lattice(word) if len(word) <= MAX_CACHED_LENGTH else self._lattice(word)
                end = len(lattice) - 1
                backwards = []
                while end > 0:
                    cumulative, starts, pieces = lattice[end]
                    edge = bisect_right(cumulative, uniform() * cumulative[-1]) if len(cumulative) > 1 else 0
                    edge = min(edge, len(starts) - 1)
                    backwards.append(pieces[edge])
                    end = starts[edge]
                for piece in reversed(backwards):
                    ids += piece
            ids += self.tokenizer.separator_ids(separator)
        return np.array(ids, dtype=np.int64)

    def _lattice(self, word: str) -> list[LatticeEdges]:
        """For each end position in a word, the pieces that may end there."""
        totals = [0.0]  # the log of the summed weight of all segmentations of word[:end]
        lattice: list[LatticeEdges] = [([], [], [])]
        for end in range(1, len(word) + 1):
            logs, starts, pieces = [], [], []
            for start in range(max(0, end - self._longest), end):
                if known := self._scores.get(word[start:end]):
                    ids, score = [known[0]], known[1]
                elif start == end - 1:
                    ids, score = self._unknown_ids(word, start), self._unknown_score
                else:
                    continue
                logs.append(totals[start] + self._sampling.alpha * score)
                starts.append(start)
                pieces.append(ids)
            best = max(logs)
            cumulative = list(accumulate(math.exp(log - best) for log in logs))
            totals.append(best + math.log(cumulative[-1]))
            lattice.append((cumulative, starts, pieces))
        return lattice

    def _unknown_ids(self, word: str, at: int) -> list[int]:
        """The bytes of a character without a piece; a lossy tokenizer has one `<unk>` for several in a row."""
        if self.tokenizer.lossless:
            return self.tokenizer.byte_ids(word[at])
        return [] if at and word[at - 1] not in self._scores else [self.tokenizer.unknown_id]


def resegmented_windows(
    ids: TokenArray,
    tokenizer: Tokenizer,
    sampling: SubwordSampling,
    processes: int,
    block_size: int,
    seed: int,
    order: str,
) -> WindowSource:
    """Windows of a text that is segmented anew in every epoch, shard by shard, as a function of (seed, epoch, shard).

    Each of the worker `processes` segments one shard ahead of use; without any, this process segments. For the other
    arguments see `WindowSource`.
    """
    SubwordSampler(tokenizer, sampling)  # raises before the first shard
    load = partial(_segment, ids, tokenizer.to_bytes(), sampling, seed)
    pool = process_pool(processes) if processes else None
    return WindowSource(load, ids.lengths, block_size, seed, order, pool, processes)


def _segment(ids: TokenArray, tokenizer: bytes, sampling: SubwordSampling, seed: int, epoch: int, shard: int) -> Tokens:
    sampler = _sampler(tokenizer, sampling)
    number = shard if len(ids.shards) > 1 else None
    return sampler.sample(_decode_chunks(sampler.tokenizer, ids.shard(shard)), seed, epoch, number).astype(ids.dtype)


@lru_cache(1)
def _sampler(tokenizer: bytes, sampling: SubwordSampling) -> SubwordSampler:
    return SubwordSampler(SentencePieceTokenizer(tokenizer), sampling)


def _decode_chunks(tokenizer: SentencePieceTokenizer, ids: Tokens) -> Iterator[TextChunk]:
    """The text of `ids`, one chunk per document."""
    unknown = ""
    if (ids == tokenizer.unknown_id).any():  # written as a private-use character that occurs in no piece
        unknown = min(set(map(chr, range(0xE000, 0xF900))).difference(*tokenizer.pieces))
    ends = ids == (-1 if tokenizer.eos_id is None else tokenizer.eos_id)
    for document in filter(len, np.split(ids, np.flatnonzero(ends) + 1)):
        ends_document = document[-1] == tokenizer.eos_id
        if (document == tokenizer.unknown_id).any():  # which `decode` would write as ⁇
            known = document[:-1] if ends_document else document
            pieces = (unknown if index == tokenizer.unknown_id else tokenizer.pieces[index] for index in known)
            yield TextChunk("".join(pieces).replace(SPACE, " "), ends_document)
        else:
            yield TextChunk(tokenizer.decode(document.tolist()), ends_document)
