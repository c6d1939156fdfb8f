"""Tokenizers as Hugging Face's `tokenizer.json`, which gives any text the same ids as the original tokenizer.

The file is written by hand, because converters of SentencePiece models change the ids of double spaces, newlines and
literal `<s>`:

- Pieces are written with spaces in place of SentencePiece's ▁, so nothing needs normalizing. A literal ▁ in a text is a
  character that no piece covers: three byte pieces, as in SentencePiece.
- User-defined pieces of BPE models, which no merge produces, are added tokens.
- End of text is the only special token, and `split_special_tokens` keeps transformers from finding it in a text.
- Pieces that no text may produce (`<s>`, `<0x41>`) score lower than the sum of their characters' scores. This needs an
  entry for each ASCII character: one that the training text lacks takes the place of its byte piece.
"""

import re
import warnings
from typing import Any, NamedTuple

from lmlight.data.hf_tokenizer import HFTokenizer
from lmlight.data.sentencepiece_training import END_OF_TEXT, SPACE, UNKNOWN_PENALTY
from lmlight.data.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer
from lmlight.errors import UserError

# ModelProto.SentencePiece.Type; llama.cpp uses the same numbers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Pre-tokenizers of byte-level BPE, and their names in llama.cpp.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _QWEN2 % ""), ("ByteLevel", False)): "qwen2",
    (("Split", _QWEN2 % "{1,3}"), ("ByteLevel", False)): "llama-bpe",
}


class Piece(NamedTuple):
    """An entry of a SentencePiece vocabulary."""

    piece: str  # its name, with ▁ for a space
    score: float  # a log-probability (unigram), or the negated rank of a merge (BPE)
    type: int

    @property
    def text(self) -> str:
        """The text that it matches, or its name if it matches none."""
        return self.piece.replace(SPACE, " ") if self.type in (NORMAL, USER_DEFINED) else self.piece


class Vocabulary:
    """The pieces of a SentencePiece model, by id.

    In a unigram model, ASCII characters that no piece matches take the place of their byte pieces.

    Raises:
        UserError: the tokenizer is lossy.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        if not tokenizer.lossless:
            raise UserError(
                "this checkpoint's tokenizer is lossy (it changes some texts, such as repeated spaces), and other engines "
                "cannot reproduce it: train with --data.tokenizer.lossless=true, or with another tokenizer file"
            )
        with warnings.catch_warnings():  # protobuf's C extension uses a deprecated API
            warnings.simplefilter("ignore")
            from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
        proto.ParseFromString(tokenizer.to_bytes())  # only the protocol buffer has the types
        self.is_unigram = proto.trainer_spec.model_type == 1
        # Some pieces never match: SentencePiece replaces the spaces of a text by ▁, and lmlight encodes line by line.
        never = re.compile(r" |\n.|.\n", re.DOTALL)
        self.pieces = [
            Piece(piece.piece, piece.score, UNUSED if never.search(piece.piece) else piece.type)
            for piece in proto.pieces
        ]
        self.unknown_id = next(index for index, piece in enumerate(self.pieces) if piece.type == UNKNOWN)
        # the score, in a unigram segmentation, of a character that no piece matches
        self.unknown_score = min(piece.score for piece in self.pieces if piece.type == NORMAL) - UNKNOWN_PENALTY
        texts = {piece.text for piece in self.pieces}
        for index, piece in enumerate(self.pieces):
            if self.is_unigram and piece.type == BYTE:
                character = chr(int(piece.piece[3:5], 16))
                if character.isascii() and character not in texts:
                    self.pieces[index] = Piece(character, self.unknown_score, NORMAL)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Raises:
        UserError: the tokenizer is a lossy SentencePiece model, or of a user-defined class.
    """
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.content
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added: list[dict[str, Any]] = []
    decoders = [{"type": "Fuse"}]
    if isinstance(tokenizer, CharTokenizer):  # a text has one segmentation only
        model = {"type": "Unigram", "unk_id": None, "vocab": [[c, 0.0] for c in tokenizer.characters]}
    elif isinstance(tokenizer, SentencePieceTokenizer):
        vocabulary = Vocabulary(tokenizer)
        model = _unigram(vocabulary) if vocabulary.is_unigram else _bpe(vocabulary)
        if not vocabulary.is_unigram:  # in a unigram model, user-defined pieces have a score instead
            added += (
                {"id": index, "content": piece.text, **token}
                for index, piece in enumerate(vocabulary.pieces)
                if piece.type == USER_DEFINED and len(piece.text) > 1
            )
        decoders.insert(0, {"type": "ByteFallback"})
    else:
        raise UserError(
            f"a {type(tokenizer).__name__} cannot be exported: only tokenizers from lmlight or a tokenizer.json can"
        )
    if tokenizer.eos_id is not None:
        added.append({"id": tokenizer.eos_id, "content": END_OF_TEXT, **token, "special": True})
    decoder = {"type": "Sequence", "decoders": decoders}
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor"))
    return {"version": "1.0", "added_tokens": added, **unused, "decoder": decoder, "model": model}


def pre_tokenizer_name(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer; None if it has no name there."""
    if not isinstance(tokenizer, HFTokenizer):
        return None
    pre = tokenizer.content.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if tokenizer.content["model"].get("type") != "BPE" or any(step.get("add_prefix_space") for step in steps):
        return None
    if tokenizer.content.get("normalizer") not in (None, {"type": "NFC"}):  # NFC is Qwen2's, and changes few texts
        return None
    rules = []
    for step in steps:
        pattern = step.get("pattern")
        rule = pattern.get("Regex") if pattern else step.get("individual_digits", step.get("use_regex", True))
        rules.append((step.get("type"), rule))
    return PRE_TOKENIZERS.get(tuple(rules))


def _unigram(vocabulary: Vocabulary) -> dict[str, Any]:
    pieces = vocabulary.pieces
    best = max(piece.score for piece in pieces if piece.type == NORMAL)
    never = (max(len(piece.piece) for piece in pieces) + 1) * (vocabulary.unknown_score - UNKNOWN_PENALTY)

    def score(piece: Piece) -> float:
        if piece.type == USER_DEFINED:  # SentencePiece's rule: it wins over everything that matches the same text
            return len(piece.piece.encode()) * best - 0.1
        return piece.score if piece.type == NORMAL else never

    entries = [[piece.text, score(piece)] for piece in pieces]
    return {"type": "Unigram", "unk_id": vocabulary.unknown_id, "byte_fallback": True, "vocab": entries}


def _bpe(vocabulary: Vocabulary) -> dict[str, Any]:
    pieces = vocabulary.pieces
    ranked = [piece.text for piece in sorted(pieces, key=lambda piece: -piece.score) if piece.type == NORMAL]
    known = set(ranked)
    cuts = ((text[:at], text[at:]) for text in ranked for at in range(1, len(text)))  # best first
    return {
        "type": "BPE",
        "unk_token": pieces[vocabulary.unknown_id].piece,
        "byte_fallback": True,
        "vocab": {piece.text: index for index, piece in enumerate(pieces)},
        "merges": [[left, right] for left, right in cuts if left in known and right in known],
    }
