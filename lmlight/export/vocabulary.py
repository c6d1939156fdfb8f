"""A SentencePiece model's pieces with their kinds, which only its own file tells apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lmlight.data.sentencepiece_training import SPACE, UNKNOWN_PENALTY
from lmlight.data.tokenizer import SentencePieceTokenizer
from lmlight.errors import UserError

Kind = Literal["normal", "unknown", "control", "user", "unused", "byte"]
KINDS: dict[int, Kind] = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}  # SentencePiece's


class Piece(NamedTuple):
    """One entry; its place is its id.

    Attributes:
        text: as SentencePiece writes it, a space as ▁.
        score: a log-probability, or the negated rank of a merge.
        kind: what may produce it.
    """

    text: str
    score: float
    kind: Kind

    @property
    def plain(self) -> str:
        """The text that it stands for."""
        return self.text.replace(SPACE, " ")


@dataclass(frozen=True)
class Vocabulary:
    """All pieces.

    Attributes:
        algorithm: how a text is segmented.
        pieces: by their ids.
    """

    algorithm: Literal["unigram", "bpe"]
    pieces: list[Piece]

    @classmethod
    def of(cls, tokenizer: SentencePieceTokenizer) -> Vocabulary:
        """Those of a tokenizer of ours.

        Raises:
            UserError: it is lossy.
        """
        if not tokenizer.lossless:
            raise UserError(
                "this checkpoint's tokenizer is lossy (it drops newlines and runs of spaces), which no other engine's "
                "repeats to the letter: train one with --data.tokenizer.lossless true"
            )
        proto = parse(tokenizer.to_bytes())
        pieces = [Piece(piece.piece, piece.score, KINDS[piece.type]) for piece in proto.pieces]
        return cls("unigram" if proto.trainer_spec.model_type == 1 else "bpe", pieces)

    @property
    def unknown_score(self) -> float:
        """What a unigram segmentation pays for a character that no piece covers."""
        return min(piece.score for piece in self.pieces if piece.kind == "normal") - UNKNOWN_PENALTY

    def ascii_bytes(self) -> dict[int, str]:
        """The byte pieces whose place an engine without bytes gives to an ASCII character: those that no other piece is."""
        matched = {piece.plain for piece in self.pieces if piece.kind in ("normal", "user")}
        bytes_of = {index: int(piece.text[3:5], 16) for index, piece in enumerate(self.pieces) if piece.kind == "byte"}
        return {index: chr(byte) for index, byte in bytes_of.items() if byte < 128 and chr(byte) not in matched}

    def score_of(self, piece: Piece) -> float:
        """A unigram score as SentencePiece counts it: a user's symbol beats whatever else could be there."""
        if piece.kind != "user":
            return piece.score
        best = max(piece.score for piece in self.pieces if piece.kind == "normal")
        return len(piece.text.encode()) * best - 0.1

    def merges(self) -> list[tuple[str, str]]:
        """The pairs that BPE joins, the first ones first: all ways to cut each piece into two others."""
        ranked = sorted((p for p in self.pieces if p.kind == "normal"), key=lambda piece: -piece.score)
        texts = {piece.plain for piece in ranked}
        return [
            (text[:at], text[at:])
            for text in (piece.plain for piece in ranked)
            for at in range(1, len(text))
            if text[:at] in texts and text[at:] in texts
        ]


def parse(model: bytes) -> Any:
    """The protocol buffer inside a `.model` file."""
    with warnings.catch_warnings():  # of the C extension's age
        warnings.simplefilter("ignore")
        from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    proto.ParseFromString(model)
    return proto
