"""Text to token ids and back.

- SentencePiece, unigram or BPE, made *lossless*: `decode(encode(text)) == text` for every Unicode string. Nothing is
  normalised, newlines are a piece of their own, and a character that no piece covers becomes its UTF-8 bytes.
  `lossless=False` is SentencePiece's default instead, which folds newlines and runs of spaces into one space.
- The character vocabulary, as the baseline with the same interface.
- The end of a document is a token of its own, in the vocabularies of corpora that have documents. No text gives it, not
  even its own name, and it stands for no text.

Text is encoded line by line, and very long lines in stretches. Over a whole file SentencePiece adds up scores in fp32
until they are too large to tell two segmentations apart. Free of torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from lmlight.data.reading import MAX_LINE, TextChunk, stretches
from lmlight.errors import UserError

# What the end of a document is called in a vocabulary: the name that GPT-2 gave it.
END_OF_TEXT = "<|endoftext|>"
SPACE = "\u2581"  # "▁": how SentencePiece writes a space inside its pieces
UNKNOWN = "\u2585"  # "▅": how its trainer writes a character that it leaves out
UNKNOWN_PENALTY = 10.0  # SentencePiece's kUnkPenalty: a character that no piece covers scores so much below the least
# What could move a terminal's cursor, or turn text around: control characters but for tab and line feed, line and paragraph
# separators, bidirectional embeddings, overrides and isolates.
CONTROL_CHARACTERS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Fixed, since the result of unigram training depends on it: the same text gives the same pieces on any machine.
TRAINING_THREADS = 4
# SentencePiece silently skips training lines of more than 4,192 bytes: longer ones are cut, at 4 bytes a character.
MAX_LINE_CHARS = 1000
# From this size on, a vocabulary that cannot hold all characters of a text leaves the rarest to the bytes.
FEWEST_TO_LEAVE_OUT = 512
# Appended to the SentencePiece model of a text whose lines do not end in LF: protobuf field 200, the first extension number,
# a string that SentencePiece ignores. The vocabulary alone does not tell the line ending: a carriage return in it may come
# from a few lines of a large text.
_NEWLINE_FIELDS = {"\n": b"", "\r\n": b"\xc2\x0c\x02\r\n", "\r": b"\xc2\x0c\x01\r"}


class Tokenizer(ABC):
    """What the rest of the package needs of a tokenizer.

    Attributes:
        vocab_size: number of ids; they run from 0.
        lossless: whether `decode(encode(text)) == text` for every text that can be encoded.
        char_counts: (vocab_size,) the characters of text that each id stands for; a byte piece counts at the first byte
            of its character, so a text's counts add up to its length where the tokenizer is lossless. The end of a
            document stands for none.
        eos_id: the id that ends a document; None if the vocabulary has none.
        newline: the line ending of the training text, `"\\n"`, `"\\r\\n"` or `"\\r"`.
    """

    vocab_size: int
    lossless: bool
    newline: str
    char_counts: npt.NDArray[np.int64]
    eos_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, always the same ones.

        Raises:
            UserError: a character that the vocabulary has no id for (the character vocabulary only).
        """

    def encode_passages(self, passages: Iterable[TextChunk]) -> list[int]:
        """The ids of a corpus's passages, with `eos_id`, if there is such an id, behind each document.

        Raises:
            UserError: see `encode`.
        """
        end = [] if self.eos_id is None else [self.eos_id]
        return [index for text, ends in passages for index in (self.encode(text) + end if ends else self.encode(text))]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """All of it, for a file or a checkpoint; `from_bytes` is the way back."""

    @abstractmethod
    def id_to_piece(self, index: int) -> str:
        """What an id stands for, as it is called in the vocabulary: SentencePiece writes a space as ▁."""

    def byte_of(self, index: int) -> bytes:
        """The byte that an id stands for, if it is a byte piece; else nothing."""
        return b""

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt, with its line endings changed to those of the training text.

        Raises:
            UserError: see `encode`.
        """
        # a vocabulary with carriage returns may also use them alone
        line_ending = "\r?\n" if "\r" in self.newline else "\r\n?"
        return self.encode(re.sub(line_ending, self.newline, prompt))

    @property
    def bos_ids(self) -> list[int]:
        """Ids to start from when the prompt is empty: EOS if the vocabulary has one, else the end of a line.

        For CRLF, only the LF: training windows also start after it, and other engines accept a single id.
        """
        if self.eos_id is not None:
            return [self.eos_id]
        try:
            return self.encode(self.newline[-1]) or [0]  # a lossy tokenizer has no newline: the notebook's token 0
        except UserError:  # nor has a character vocabulary of a text without one
            return [0]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of `to_bytes()`: equal for equal tokenizers only."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class StreamingDecoder:
    """The text of ids that come one by one; what it gives, joined, is what `decode` gives for all of them.

    Bytes of a character are held back until it is whole, or known to be broken.

    Args:
        tokenizer: decodes.
        before: the ids that the text follows, if any; a lossy tokenizer drops a space at the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # what a lossy tokenizer needs to see: from the last id that is text of its own on
        for index in before:
            self._remember(index)
        self._bytes: list[int] = []

    def push(self, index: int) -> str:
        """The text that has become certain with this id."""
        if self._tokenizer.byte_of(index):
            self._bytes.append(index)
            try:
                b"".join(map(self._tokenizer.byte_of, self._bytes)).decode()
            except UnicodeDecodeError:
                return ""
            return self.flush()
        text = self.flush() + self._decode([index])
        self._remember(index)
        return text

    def flush(self) -> str:
        """The text of what is held back."""
        text, self._bytes = self._decode(self._bytes), []
        return text

    def _remember(self, index: int) -> None:
        if not self._tokenizer.lossless:
            self._before = [index] if self._tokenizer.decode([index]) else [*self._before, index]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(self._before + ids)[len(self._tokenizer.decode(self._before)) :]


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to train on the training text.

    Args:
        kind: SentencePiece's unigram or BPE model, or the plain set of characters.
        vocab_size: number of pieces, the 256 bytes of the lossless ones included; fewer where the text cannot fill them.
            The character vocabulary has as many as there are characters.
        lossless: keep every character. False is SentencePiece's default normalisation, which loses newlines.
        sample_chars: characters of the training text that SentencePiece learns from; of a longer one, lines are drawn at
            random, always the same. 10 million take some 20 s and 300 MB.

    Raises:
        UserError: a size that is not positive.
    """

    kind: Literal["unigram", "bpe", "char"] = "unigram"
    vocab_size: int = 2048
    lossless: bool = True
    sample_chars: int = 10_000_000

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sample_chars"):
            if getattr(self, name) < 1:
                raise UserError(f"tokenizer.{name} must be at least 1, got {getattr(self, name)}")

    def train(self, text: str | Iterable[str], chars: int | None = None, add_eos: bool = False) -> Tokenizer:
        """A tokenizer of this kind for a text.

        Args:
            text: a text, or its passages.
            chars: how many characters the passages have together; None learns from all of them.
            add_eos: give the vocabulary an id for the end of a document.

        Raises:
            UserError: `vocab_size` is too small for the characters in the text, or there is no text to learn from.
        """
        newlines = Counter[str]()
        passages = _counting_newlines([text] if isinstance(text, str) else text, newlines)
        if self.kind == "char":
            characters = set[str]()
            for passage in passages:
                characters.update(passage)
            return CharTokenizer(sorted(characters), add_eos, _most_common(newlines))
        if chars is not None and chars > self.sample_chars:
            passages = _sample(passages, self.sample_chars / chars)
        model = _train_sentencepiece(passages, self, add_eos)
        newline = _most_common(newlines)
        return SentencePieceTokenizer(model + _NEWLINE_FIELDS[newline] if newline and self.lossless else model)


def from_bytes(data: bytes) -> Tokenizer:
    """The tokenizer that `to_bytes` wrote.

    Raises:
        ValueError: `data` is no tokenizer.
    """
    if data.startswith(b"{"):
        try:
            content = json.loads(data)
            return CharTokenizer(content["characters"], content.get("add_eos", False), content.get("newline"))
        except (KeyError, TypeError):
            raise ValueError("not a character vocabulary") from None
    return SentencePieceTokenizer(data)


class CharTokenizer(Tokenizer):
    """One id for each character, as in nanoGPT's character-level example.

    Args:
        characters: the vocabulary, in the order of the ids.
        add_eos: whether one more id ends a document.
        newline: the line ending of the training text. None infers it: `"\\r\\n"` if the vocabulary has both characters.
    """

    def __init__(self, characters: Iterable[str], add_eos: bool = False, newline: str | None = None) -> None:
        self.characters = list(characters)
        self._inferred_newline = "".join(c for c in "\r\n" if c in self.characters) or "\n"
        self.newline = newline or self._inferred_newline
        self.vocab_size = len(self.characters) + add_eos
        self.eos_id = len(self.characters) if add_eos else None
        self.lossless = True
        self.char_counts = np.array([1] * len(self.characters) + [0] * add_eos, dtype=np.int64)
        self._id_of = {character: index for index, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self._id_of[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not among the {len(self.characters)} of this character vocabulary, "
                "which has those of the training text alone: leave it out, or use a unigram or bpe tokenizer"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[index] for index in ids if index != self.eos_id)

    def id_to_piece(self, index: int) -> str:
        return END_OF_TEXT if index == self.eos_id else self.characters[index]

    def to_bytes(self) -> bytes:
        content: dict[str, Any] = {"kind": "char", "characters": "".join(self.characters)}
        if self.eos_id is not None:
            content["add_eos"] = True
        if self.newline != self._inferred_newline:
            content["newline"] = self.newline
        return json.dumps(content).encode()


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model.

    Args:
        model: the bytes of a `.model` file.

    Raises:
        ValueError: they are not one.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            if not model:
                raise RuntimeError("no bytes")  # which SentencePiece would take for one to be loaded later
            self._processor = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        self.vocab_size = self._processor.vocab_size()
        self.pieces: list[str] = [self._processor.id_to_piece(index) for index in range(self.vocab_size)]
        probe = "  a \n\n b "
        self.lossless = self._processor.decode(self._processor.encode(probe)) == probe
        self.newline = next((end for end, field in _NEWLINE_FIELDS.items() if field and model.endswith(field)), "\n")
        self._newline: list[int] = self._processor.encode("\n") if self.lossless else []
        self.char_counts = np.array(
            [_starts_character(p) if self._processor.is_byte(i) else len(p) for i, p in enumerate(self.pieces)]
        )
        end = self._processor.eos_id()
        if end >= 0 and self.pieces[end] == END_OF_TEXT:  # SentencePiece's own "</s>" has never been seen in training
            self.eos_id = end
            self.char_counts[end] = 0

    def encode(self, text: str) -> list[int]:
        return self.encode_passages([TextChunk(text)])

    def encode_passages(self, passages: Iterable[TextChunk]) -> list[int]:
        lines, ends = split_passages(passages, self.lossless)
        encoded = self._processor.encode(lines)
        ids_of = {end: self._end_ids(end) for end in set(ends)}
        return list(chain.from_iterable(chain(ids, ids_of[end]) for ids, end in zip(encoded, ends)))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(list(ids))

    def id_to_piece(self, index: int) -> str:
        return self.pieces[index]

    def byte_of(self, index: int) -> bytes:
        return bytes.fromhex(self.pieces[index][3:5]) if self._processor.is_byte(index) else b""

    def to_bytes(self) -> bytes:
        return self._model

    def _end_ids(self, end: str) -> list[int]:
        if end == END_OF_TEXT:
            return [] if self.eos_id is None else [self.eos_id]
        return self._newline if end == "\n" else self._bytes(end)

    def _bytes(self, text: str) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def split_passages(passages: Iterable[TextChunk], lossless: bool) -> tuple[list[str], list[str]]:
    """What SentencePiece may see, line by line, and what comes behind each: a newline, nothing, a literal "▁",
    `END_OF_TEXT` for the end of a document.

    A literal "▁" would come back as a space, so `encode` writes it as bytes. Long lines are cut into stretches.
    """
    lines, ends = list[str](), list[str]()
    for text, ends_document in passages:
        whole = text.split("\n")
        if SPACE not in text and max(map(len, whole)) <= MAX_LINE:
            lines += whole
            ends += ["\n"] * (len(whole) - 1) + [""]
        else:
            for line in whole:
                for stretch in stretches(line):
                    parts = stretch.split(SPACE) if lossless else [stretch]
                    lines += parts
                    ends += [SPACE] * (len(parts) - 1) + [""]
                ends[-1] = "\n"
            ends[-1] = ""
        if ends_document:
            ends[-1] = END_OF_TEXT
    return lines, ends


def _starts_character(byte_piece: str) -> int:
    """1 if this byte piece (`<0xE2>`) is the first of a character's UTF-8 bytes, 0 if it continues one."""
    return int(int(byte_piece[3:5], 16) & 0xC0 != 0x80)


def _counting_newlines(passages: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    for text in passages:
        if "\r" in text:
            crlf = text.count("\r\n")
            counts.update({"\n": text.count("\n") - crlf, "\r\n": crlf, "\r": text.count("\r") - crlf})
        else:
            counts["\n"] += text.count("\n")
        yield text


def _most_common(newlines: Counter[str]) -> str | None:
    """The line ending that was counted most often; None if there were none."""
    return max(newlines, key=newlines.__getitem__) if newlines.total() else None


def _sample(passages: Iterable[str], share: float) -> Iterator[str]:
    """Lines, each with the same probability; of lines that are very long, stretches."""
    draw = np.random.default_rng(0)
    for text in passages:
        lines = [stretch for line in text.split("\n") for stretch in stretches(line)]
        yield "\n".join(compress(lines, draw.random(len(lines)) < share))


def _train_sentencepiece(passages: Iterable[str], config: TokenizerConfig, add_eos: bool) -> bytes:
    # what SentencePiece uses as marks of its own: it would pass over lines that have them
    apart = re.compile(f"[\n{SPACE}{UNKNOWN}]" if config.lossless else f"[\n{UNKNOWN}]")
    lines = [
        line[start : start + MAX_LINE_CHARS]
        for text in passages
        for line in apart.split(text)
        for start in range(0, len(line), MAX_LINE_CHARS)
    ]
    options: dict[str, Any] = {
        "model_type": config.kind,
        "vocab_size": config.vocab_size,
        "num_threads": TRAINING_THREADS,
        "max_sentence_length": 4 * MAX_LINE_CHARS,
        "minloglevel": 2,
    }
    if config.lossless:
        options |= {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "byte_fallback": True,
            "character_coverage": 1.0,
            # alone: overlapping user symbols ("\n\n") can tie
            "user_defined_symbols": ["\n"],
            # a text without spaces would leave no piece for one, and its bytes would come back as "▁"
            "required_chars": SPACE,
            "bos_id": -1,
            "eos_id": -1,
        }
    if add_eos:  # a control symbol, which no text gives
        options |= {"eos_id": 1 if config.lossless else 2, "eos_piece": END_OF_TEXT}
    left_out = False
    for _ in range(3):
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
            return model.getvalue()
        except RuntimeError as error:
            if too_high := re.search(r"Vocabulary size too high .* value <= (\d+)", str(error)):
                largest = int(too_high[1])
                warnings.warn(
                    f"vocab_size {config.vocab_size:,} is more than this text can fill: training {largest:,} pieces, "
                    "the most that it gives",
                    stacklevel=2,
                )
                options["vocab_size"] = largest
            elif too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
                if config.lossless and config.vocab_size >= FEWEST_TO_LEAVE_OUT and not left_out:
                    left_out, lines = True, _without_rare_characters(lines, config.vocab_size)
                    continue
                raise UserError(
                    f"vocab_size {config.vocab_size:,} is too small: this text's characters"
                    f"{' and the 256 bytes' if config.lossless else ''} need at least {int(too_small[1]):,} pieces; "
                    "raise --data.tokenizer.vocab_size"
                ) from None
            else:
                reason = "it has nothing but newlines" if "sentences_.empty()" in str(error) else error
                raise UserError(
                    f"SentencePiece cannot learn pieces from this text ({reason}): pass more of it, or set "
                    "--data.tokenizer.kind char"
                ) from None
    raise AssertionError("SentencePiece refused the size that it had asked for")


def _without_rare_characters(lines: list[str], vocab_size: int) -> list[str]:
    """Lines cut at all but the most frequent characters, as many as fill half of what the 256 bytes leave of a vocabulary:
    the others will be written as bytes. Says so. (SentencePiece can leave out 2% of a text at the most.)"""
    counts = Counter(chain.from_iterable(lines))
    frequent = dict(counts.most_common((vocab_size - 256) // 2))
    warnings.warn(
        f"this text has {len(counts):,} different characters, too many for {vocab_size:,} pieces: the rarest, "
        f"{1 - sum(frequent.values()) / counts.total():.1%} of it, are written as bytes; raise "
        "--data.tokenizer.vocab_size to make room",
        stacklevel=2,
    )
    cut = str.maketrans(dict.fromkeys(counts.keys() - frequent.keys(), "\n"))
    return [part for line in lines for part in line.translate(cut).split("\n") if part]
