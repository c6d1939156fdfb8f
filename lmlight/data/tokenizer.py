"""Text to token ids and back.

- SentencePiece, unigram or BPE, is *lossless*: `decode(encode(text)) == text` for every Unicode string. Nothing is
  normalized, a newline is a piece, and a character without a piece becomes its UTF-8 bytes. `lossless=False` is
  SentencePiece's default, which turns newlines and runs of spaces into one space.
- The character vocabulary is a baseline with the same interface.
- Vocabularies of corpora with documents have an EOS token. No text encodes to it, and it decodes to no text.
- Text is encoded line by line: over longer texts SentencePiece adds up scores in fp32 until rounding changes which
  segmentation wins.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from lmlight.data.reading import TextChunk
from lmlight.data.sentencepiece_training import END_OF_TEXT, SPACE, split_chunks, train_sentencepiece
from lmlight.errors import UserError, check_literals
from lmlight.user_code import explained, full_name, subclasses

# Could move a terminal's cursor or reorder text: control characters (except tab and line feed), line and paragraph
# separators, bidirectional embeddings, overrides and isolates.
CONTROL_CHARACTERS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Appended to the SentencePiece model of a text whose lines end in CRLF. SentencePiece ignores this protobuf field (200, a
# string). The vocabulary cannot tell: it has a carriage return even if only a few lines end in CRLF.
CRLF_FIELD = b"\xc2\x0c\x02\r\n"
# A pretrained tokenizer that does not restore this text is lossy: spaces, combining and wide characters, names of pieces.
PROBE = " a  b\n\n\tb e\u0301 \ufb01 \u00bd \u4e2d\U0001f642\u200d \u2581 <0x41> ##b <s> </s> A\r\nB 'S , "


class Tokenizer(ABC):
    """The interface of all tokenizers. A subclass implements `encode`, `decode` and `to_bytes`, and sets `char_counts`.

    Attributes:
        char_counts: (vocab_size,) the number of characters that each id stands for. A byte piece counts if it is the first
            byte of a character, so the counts of a text add up to its length if the tokenizer is lossless. EOS counts 0.
        lossless: whether `decode(encode(text)) == text` for every text that can be encoded.
        eos_id: the id that ends a document; None if the vocabulary has none.
        newline: the line ending of the training text, `"\\n"` or `"\\r\\n"`.
    """

    char_counts: npt.NDArray[np.int64]
    lossless = True
    eos_id: int | None = None
    newline = "\n"

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            UserError: a character is not in the vocabulary (`CharTokenizer` only).
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The serialized tokenizer, for `from_bytes`."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """The tokenizer that `to_bytes` serialized; by default the constructor takes its bytes.

        Raises:
            ValueError: `data` is not such a tokenizer.
        """
        return cls(data)  # type: ignore[call-arg]  # a subclass's constructor takes the bytes

    def __reduce__(self) -> tuple[Any, ...]:  # for worker processes: a library's own pickling may be incomplete
        return type(self).from_bytes, (self.to_bytes(),)

    @property
    def vocab_size(self) -> int:
        """The number of ids, which start at 0."""
        return len(self.char_counts)

    def encode_chunks(self, chunks: Iterable[TextChunk]) -> list[int]:
        """The ids of a text, with `eos_id`, if there is one, after each document; see `encode`."""
        ids: list[int] = []
        for text, ends_document in chunks:
            ids.extend(self.encode(text))
            if ends_document and self.eos_id is not None:
                ids.append(self.eos_id)
        return ids

    def id_to_piece(self, index: int) -> str:
        """The piece with this id, for display; SentencePiece writes a space as ▁."""
        return END_OF_TEXT if index == self.eos_id else self.decode([index])

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt, after changing its line endings to those of the training text."""
        return self.encode(re.sub("\r?\n", self.newline, prompt))

    @property
    def bos_ids(self) -> list[int]:
        """Ids to start from when the prompt is empty: EOS if the vocabulary has one, else newline, else 0.

        With CRLF, only the LF: training windows may start with it, too, and other inference engines accept only one id.
        """
        if self.eos_id is not None:
            return [self.eos_id]
        try:
            return self.encode("\n") or [0]
        except UserError:
            return [0]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the class and `to_bytes()`."""
        return hashlib.sha256(serialize(self)).hexdigest()


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to train on the training text.

    Args:
        kind: a SentencePiece unigram or BPE model, or a character vocabulary.
        vocab_size: number of pieces, including the 256 bytes of lossless tokenizers; fewer if the text is too small.
            Ignored if `kind` is `char`.
        lossless: keep every character. False uses SentencePiece's default, which turns newlines into spaces.
        sample_chars: number of characters that SentencePiece is trained on. From a longer text, random lines are taken,
            always the same ones. 10 million take about 20 s and 300 MB.

    Raises:
        UserError: `kind` is not a valid choice, or a size is not positive.
    """

    kind: Literal["unigram", "bpe", "char"] = "unigram"
    vocab_size: int = 2048
    lossless: bool = True
    sample_chars: int = 10_000_000

    def __post_init__(self) -> None:
        check_literals(TokenizerConfig, vars(self), "data.tokenizer.")
        for name in ("vocab_size", "sample_chars"):
            if getattr(self, name) < 1:
                raise UserError(f"data.tokenizer.{name} must be at least 1, got {getattr(self, name)}")

    def train(self, text: str | Iterable[str], chars: int | None = None, add_eos: bool = False) -> Tokenizer:
        """Trains a tokenizer.

        Args:
            text: a text, or its chunks.
            chars: the number of characters in all chunks; None trains on all of them.
            add_eos: add an EOS token to the vocabulary.

        Raises:
            UserError: `vocab_size` is too small for the characters of the text, or the text has nothing to train on.
        """
        crlf = lf = 0

        def counted() -> Iterator[str]:
            nonlocal crlf, lf
            for chunk in [text] if isinstance(text, str) else text:
                crlf += chunk.count("\r\n")
                lf += chunk.count("\n")
                yield chunk

        if self.kind == "char":
            characters = sorted(set(chain.from_iterable(counted())))
            return CharTokenizer(characters, add_eos, "\r\n" if 2 * crlf > lf else "\n")
        share = min(1.0, self.sample_chars / chars) if chars else 1.0
        model = train_sentencepiece(counted(), self.kind, self.vocab_size, self.lossless, add_eos, share)
        return SentencePieceTokenizer(model + CRLF_FIELD if self.lossless and 2 * crlf > lf else model)


def starts_character(byte: int) -> bool:
    """Whether a byte of UTF-8 is the first of its character; 0b10xxxxxx continues one."""
    return byte & 0xC0 != 0x80


def serialize(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as bytes, with the name of its class, for `deserialize`."""
    return f"{full_name(type(tokenizer))}\n".encode() + tokenizer.to_bytes()


def deserialize(data: bytes) -> Tokenizer:
    """The tokenizer that `serialize` wrote. Its class must have been imported: a name in the data never imports code.

    Raises:
        ValueError: `data` is not a tokenizer.
        UserError: its class is not lmlight's and has not been imported.
    """
    prefix, _, content = data.partition(b"\n")
    name = prefix.decode("ascii", "replace")
    if name == "lmlight.data.hf_tokenizer.HFTokenizer":  # the only one of lmlight's outside this module
        importlib.import_module("lmlight.data.hf_tokenizer")
    known = subclasses(Tokenizer)
    if name in known:
        return known[name].from_bytes(content)
    if name.startswith("lmlight.") or not re.fullmatch(r"[\w.<>]+", name):
        raise ValueError("not a tokenizer")
    last = f".{name.rpartition('.')[2]}"  # its module may have been moved
    moved = [kind for full, kind in known.items() if full.endswith(last) and not full.startswith("lmlight.")]
    if len(moved) != 1:
        raise UserError(
            f"the tokenizer is a {name}, whose module is not imported, because that would run its code: if you trust it, "
            f"pass --data.tokenizer {name}, or import it first in Python"
        )
    return moved[0].from_bytes(content)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise a `UserError` if an attribute of a user-defined tokenizer is wrong, or its bytes do not restore it."""
    name, counts = type(tokenizer).__name__, getattr(tokenizer, "char_counts", None)
    if not isinstance(counts, np.ndarray) or counts.ndim != 1 or counts.dtype.kind not in "iu":
        raise UserError(f"{name}.char_counts must be a NumPy array of integers, one for each id")
    if tokenizer.eos_id is not None and not 0 <= tokenizer.eos_id < len(counts):
        raise UserError(f"{name}.eos_id must be None or an id below {len(counts)}, got {tokenizer.eos_id}")
    with explained(f"{name} cannot be stored: from_bytes must restore it from the bytes that to_bytes returns"):
        deserialize(serialize(tokenizer))


class CharTokenizer(Tokenizer):
    """One id for each character, as in nanoGPT's character-level example.

    Args:
        characters: the vocabulary, in the order of the ids.
        add_eos: whether to add an end-of-text token.
        newline: the line ending of the training text.
    """

    def __init__(self, characters: Iterable[str], add_eos: bool = False, newline: str = "\n") -> None:
        self.characters, self.newline = list(characters), newline
        self.eos_id = len(self.characters) if add_eos else None
        self.char_counts = np.array([1] * len(self.characters) + [0] * add_eos, dtype=np.int64)
        self._id_of = {character: index for index, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self._id_of[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not among the {len(self.characters)} of this character vocabulary, "
                "which come from the training text: leave it out, or use a unigram or bpe tokenizer"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[index] for index in ids if index != self.eos_id)

    @classmethod
    def from_bytes(cls, data: bytes) -> CharTokenizer:
        try:
            return cls(**json.loads(data))
        except TypeError:
            raise ValueError("not a character vocabulary") from None

    def to_bytes(self) -> bytes:
        content = {"characters": "".join(self.characters), "add_eos": self.eos_id is not None, "newline": self.newline}
        return json.dumps(content).encode()


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model.

    Args:
        model: the bytes of a `.model` file.

    Raises:
        ValueError: they are not a model.
    """

    def __init__(self, model: bytes) -> None:
        self._model, self._processor = model, spm.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        self.pieces: list[str] = [self._processor.id_to_piece(index) for index in range(self._processor.vocab_size())]
        self.unknown_id: int = self._processor.unk_id()
        self.newline = "\r\n" if model.endswith(CRLF_FIELD) else "\n"
        self._newline: list[int] = self._processor.encode("\n")
        self.char_counts = np.array([len(piece) for piece in self.pieces])
        for index in filter(self._processor.is_byte, range(len(self.pieces))):
            byte = int(self.pieces[index][3:5], 16)  # "<0xE2>"
            self.char_counts[index] = starts_character(byte)
        if self.unknown_id >= 0:
            self.char_counts[self.unknown_id] = 1  # at least: it may stand for several characters
        probe = self.encode(PROBE)
        self.lossless = self.decode(probe) == PROBE and bool(self.char_counts[probe].sum() == len(PROBE))
        if SPACE in self._processor.normalize("a"):  # the model adds a space to each line: drop the newline
            self._newline = []
        elif self._newline in ([], [self.unknown_id]) and SPACE in self.pieces:  # lines must not run together
            self._newline = [self.pieces.index(SPACE)]
        eos = self._processor.eos_id()
        if eos >= 0 and self.pieces[eos] == END_OF_TEXT:  # SentencePiece's own "</s>" does not occur in training
            self.eos_id = eos
            self.char_counts[eos] = 0

    def encode(self, text: str) -> list[int]:
        return self.encode_chunks([TextChunk(text)])

    def encode_chunks(self, chunks: Iterable[TextChunk]) -> list[int]:
        parts, separators = split_chunks(chunks, self.lossless)
        ids_of = {separator: self.separator_ids(separator) for separator in set(separators)}
        encoded = zip(self._processor.encode(parts), separators)
        return list(chain.from_iterable(chain(ids, ids_of[separator]) for ids, separator in encoded))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(list(ids))

    def id_to_piece(self, index: int) -> str:
        return self.pieces[index]

    def to_bytes(self) -> bytes:
        return self._model

    @property
    def is_unigram(self) -> bool:
        """Whether scores are log-probabilities. Those of BPE are the negated ranks of its merges, whole numbers."""
        return any(not score.is_integer() for _, score in self.scores().values())

    def scores(self) -> dict[str, tuple[int, float]]:
        """The pieces that match text, with their ids and scores: all but bytes, unknown and control pieces."""
        model = self._processor
        special = (model.is_byte, model.is_unknown, model.is_control)
        matching = (index for index in range(len(self.pieces)) if not any(is_kind(index) for is_kind in special))
        return {self.pieces[index]: (index, model.get_score(index)) for index in matching}

    def normalize(self, text: str) -> str:
        """The text after SentencePiece's normalization, in which spaces are ▁."""
        return text.replace(" ", SPACE) if self.lossless else self._processor.normalize(text)

    def separator_ids(self, separator: str) -> list[int]:
        """The ids of a separator, see `split_chunks`."""
        if separator == END_OF_TEXT:
            return [] if self.eos_id is None else [self.eos_id]
        return self._newline if separator == "\n" else self.byte_ids(separator)

    def byte_ids(self, text: str) -> list[int]:
        """The byte pieces of a text."""
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
