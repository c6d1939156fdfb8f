"""Our tokenizers as a `tokenizer.json`, which Hugging Face's `tokenizers` runs: the same ids for any text.

Written by hand, because what converts `.model` files changes the ids of double spaces, newlines and literal `<s>`:

- Pieces are written with spaces in place of SentencePiece's ▁, so that nothing is normalised, and a literal ▁ is a
  character like any other that no piece covers: three bytes, as with us.
- The end of a document is the one special token, which who decodes may leave out; `split_special_tokens` in the tokenizer's
  config keeps transformers from finding it in a text. No other is special: what must never come out of a text (`<s>`,
  `<0x41>`) scores less than its characters, one by one; for this each ASCII character has an entry: one that the training
  text lacks takes the place of its byte.
"""

from __future__ import annotations

from typing import Any

from lmlight.data.sentencepiece_training import END_OF_TEXT, UNKNOWN_PENALTY
from lmlight.data.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer
from lmlight.export.vocabulary import Vocabulary


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Raises:
        UserError: the tokenizer is lossy.
    """
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if isinstance(tokenizer, CharTokenizer):
        # every segmentation of a text is the one into its characters
        model = {"type": "Unigram", "unk_id": None, "vocab": [[c, 0.0] for c in tokenizer.characters]}
        decoders = decoders[1:]
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        vocabulary = Vocabulary.of(tokenizer)
        model = _unigram(vocabulary) if vocabulary.algorithm == "unigram" else _bpe(vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _end_of_text(tokenizer),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _end_of_text(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.eos_id is None:
        return []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": tokenizer.eos_id, "content": END_OF_TEXT, **flags}]


def _unigram(vocabulary: Vocabulary) -> dict[str, Any]:
    pieces, unknown_score = vocabulary.pieces, vocabulary.unknown_score
    ascii_bytes = vocabulary.ascii_bytes()
    longest = max(len(piece.text) for piece in pieces)
    never = (longest + 1) * (unknown_score - UNKNOWN_PENALTY)
    entries: list[list[Any]] = []
    for index, piece in enumerate(pieces):
        if piece.kind in ("normal", "user"):
            entries.append([piece.plain, vocabulary.score_of(piece)])
        elif index in ascii_bytes:
            entries.append([ascii_bytes[index], unknown_score])
        else:
            entries.append([piece.text, never])
    unknown = next((index for index, piece in enumerate(pieces) if piece.kind == "unknown"), None)
    return {"type": "Unigram", "unk_id": unknown, "byte_fallback": True, "vocab": entries}


def _bpe(vocabulary: Vocabulary) -> dict[str, Any]:
    unknown = next((piece.text for piece in vocabulary.pieces if piece.kind == "unknown"), None)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {
            piece.plain if piece.kind in ("normal", "user") else piece.text: index
            for index, piece in enumerate(vocabulary.pieces)
        },
        "merges": [list(pair) for pair in vocabulary.merges()],
    }
