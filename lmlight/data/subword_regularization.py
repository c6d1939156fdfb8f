"""Subword regularisation: the same text in other pieces each time.

Kudo 2018, https://arxiv.org/abs/1804.10959, drawn here rather than by SentencePiece, whose generator does not repeat from
one process to the next: the same (seed, epoch) gives the same pieces everywhere. Free of torch.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from lmlight.data.reading import TextChunk
from lmlight.data.tokenizer import (
    END_OF_TEXT,
    SPACE,
    UNKNOWN_PENALTY,
    SentencePieceTokenizer,
    Tokenizer,
    split_passages,
)
from lmlight.errors import UserError


@dataclass(frozen=True)
class SubwordSampling:
    """Subword regularisation: a fresh segmentation of the training text in each epoch.

    Args:
        alpha: how much the pieces' scores count: 0 draws all segmentations alike, large values always take the best.
        nbest_size: draw among the so many best segmentations of each word; -1 among all of them.

    Raises:
        UserError: a negative `alpha`, or an `nbest_size` that is neither -1 nor at least 2.
    """

    alpha: float = 0.1
    nbest_size: int = -1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise UserError(f"subword_sampling.alpha must be a number of 0 or more, got {self.alpha}")
        if self.nbest_size != -1 and self.nbest_size < 2:
            raise UserError(f"subword_sampling.nbest_size must be -1 (all) or at least 2, got {self.nbest_size}")


# Before what is no word; none has a space mark inside.
MARK = f"mark{SPACE}"

# One way to go on with a word, drawn by its cumulative weight: the ids that end at a position, and where they begin.
Choices = tuple[list[float], list[int], list[list[int]]]


class SubwordSampler:
    """Draws segmentations of one text.

    Pieces never cross a space or a newline, so the text's lattice of segmentations falls apart into those of its words,
    and each distinct word is worked out once: its lattice is summed from the left, and a segmentation is drawn from the
    right (forward filtering, backward sampling), exactly SentencePiece's distribution. Shakespeare's million
    characters take 1 s to prepare and 0.6 s a draw.

    Args:
        tokenizer: must be a unigram model, for BPE's merges have no scores.
        text: what to segment: a text, or the passages of a corpus.
        sampling: how to draw.

    Raises:
        UserError: the tokenizer has no scores to sample by.
    """

    # Words whose segmentations `segment` remembers, the first that it meets: some 10 kB each.
    MOST_KNOWN = 15_000
    # n-best lists of unbroken stretches (Chinese, a URL) grow without bound: longer ones are cut before listing.
    MAX_NBEST_CHARS = 64

    def __init__(self, tokenizer: Tokenizer, text: str | Iterable[TextChunk], sampling: SubwordSampling) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer) or not _is_unigram(tokenizer):
            raise UserError(
                "subword_sampling draws by a unigram model's scores, which bpe and char tokenizers do not have: "
                "set --data.tokenizer.kind unigram, or --data.subword_sampling null"
            )
        self.tokenizer, self._processor, self._sampling = tokenizer, tokenizer._processor, sampling
        # ids of what can be met in a lattice; SentencePiece never matches byte pieces or <unk> against text
        self._scores = {
            piece: (index, self._processor.get_score(index))
            for index, piece in enumerate(tokenizer.pieces)
            if not (self._processor.is_byte(index) or self._processor.is_unknown(index))
            and not self._processor.is_control(index)
        }
        self._longest = max(map(len, self._scores))
        self._unknown_score = min(score for _, score in self._scores.values()) - UNKNOWN_PENALTY

        numbers: dict[str, int] = {}
        passages = [TextChunk(text)] if isinstance(text, str) else text
        self._text: list[int] = [numbers.setdefault(word, len(numbers)) for word in self._words(passages)]
        self._choices = self._lattice if sampling.nbest_size == -1 else self._nbest
        self._words_choices = [self._choices(word) for word in numbers]
        self._known: dict[str, list[Choices]] = {}

    def draw(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The ids of one segmentation of the text, a pure function of (`seed`, `epoch`)."""
        return self._draw((self._words_choices[word] for word in self._text), f"subword {seed} {epoch}")

    def segment(self, passages: Iterable[TextChunk], seed: int, epoch: int, shard: int) -> npt.NDArray[np.int64]:
        """The same for a part of a text that is too large to be worked out beforehand: in bounded memory, and slower.

        Args:
            passages: of that part.
            seed: of the run.
            epoch: counted from 0.
            shard: the part's number; the segmentation is a pure function of the three and the text.
        """
        words = self._words(passages)
        return self._draw(map(self._known_choices, words), f"subword {seed} {epoch} {shard}")

    def _known_choices(self, word: str) -> list[Choices]:
        choices = self._known.get(word)
        if choices is None:
            choices = self._choices(word)
            if len(self._known) < self.MOST_KNOWN:
                self._known[word] = choices
        return choices

    def _draw(self, words: Iterable[list[Choices]], name: str) -> npt.NDArray[np.int64]:
        uniform = random.Random(name).random
        ids: list[int] = []
        for positions in words:
            end = len(positions) - 1
            backwards = []
            while end > 0:
                cumulative, starts, pieces = positions[end]
                which = bisect_right(cumulative, uniform() * cumulative[-1]) if len(cumulative) > 1 else 0
                which = min(which, len(starts) - 1)
                backwards.append(pieces[which])
                end = starts[which]
            for piece in reversed(backwards):
                ids += piece
        return np.array(ids, dtype=np.int64)

    def _words(self, passages: Iterable[TextChunk]) -> Iterator[str]:
        """The text as SentencePiece sees it, cut where no piece can cross: before each space, around each newline."""
        for line, end in zip(*split_passages(passages, self.tokenizer.lossless)):
            normal = line.replace(" ", SPACE) if self.tokenizer.lossless else self._processor.normalize(line)
            yield from re.findall(f"{SPACE}?[^{SPACE}]+|{SPACE}", normal)
            if end and (self.tokenizer.lossless or end == END_OF_TEXT):
                yield MARK + end

    def _special(self, word: str) -> list[int] | None:
        """The ids of what is not segmented: a newline, a literal "▁", the end of a document."""
        return self.tokenizer._end_ids(word.removeprefix(MARK)) if word.startswith(MARK) else None

    def _unknown(self, word: str, at: int) -> list[int]:
        """The bytes of a character that no piece covers; without bytes, one `<unk>` for a run of them."""
        if self.tokenizer.lossless:
            return self.tokenizer._bytes(word[at])
        return [] if at and word[at - 1] not in self._scores else [self._processor.unk_id()]

    def _lattice(self, word: str) -> list[Choices]:
        """For each end position in `word`, the pieces that may end there, by cumulative probability."""
        if (special := self._special(word)) is not None:
            return [([], [], []), ([1.0], [0], [special])]
        total = [0.0]  # total[e]: log of the summed weight of all segmentations of word[:e]
        positions: list[Choices] = [([], [], [])]
        for end in range(1, len(word) + 1):
            logs, starts, pieces = [], [], []
            for start in range(max(0, end - self._longest), end):
                known = self._scores.get(word[start:end])
                if known is not None:
                    ids, score = [known[0]], known[1]
                elif start == end - 1:
                    ids, score = self._unknown(word, start), self._unknown_score
                else:
                    continue
                logs.append(total[start] + self._sampling.alpha * score)
                starts.append(start)
                pieces.append(ids)
            best = max(logs)
            cumulative = list(accumulate(math.exp(log - best) for log in logs))
            total.append(best + math.log(cumulative[-1]))
            positions.append((cumulative, starts, pieces))
        return positions

    def _nbest(self, word: str) -> list[Choices]:
        """The `nbest_size` best segmentations of `word`, as choices that each reach back to its start."""
        if (special := self._special(word)) is not None:
            return [([], [], []), ([1.0], [0], [special])]
        positions: list[Choices] = [([], [], [])]
        for start in range(0, len(word), self.MAX_NBEST_CHARS):
            stretch = word[start : start + self.MAX_NBEST_CHARS]
            candidates = self._processor.nbest_encode(stretch, nbest_size=self._sampling.nbest_size, out_type=int)
            logs = [self._sampling.alpha * sum(map(self._processor.get_score, ids)) for ids in candidates]
            best = max(logs)
            cumulative = list(accumulate(math.exp(log - best) for log in logs))
            positions.append((cumulative, [len(positions) - 1] * len(candidates), candidates))
        return positions


def _is_unigram(tokenizer: SentencePieceTokenizer) -> bool:
    """Unigram scores are log-probabilities; BPE's are the negated ranks of its merges, whole numbers."""
    processor = tokenizer._processor
    learnt = [i for i in range(processor.vocab_size()) if not (processor.is_byte(i) or processor.is_unknown(i))]
    return any(not processor.get_score(i).is_integer() for i in learnt)
