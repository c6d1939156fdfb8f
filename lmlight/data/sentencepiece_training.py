"""Trains SentencePiece models (https://arxiv.org/abs/1808.06226), lossless or with SentencePiece's default options, and
splits text for them.
"""

import io
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

import sentencepiece as spm

from lmlight.data.reading import MAX_LINE, TextChunk, split_long_line
from lmlight.errors import UserError

END_OF_TEXT = "<|endoftext|>"  # the name of the EOS token, as in GPT-2
SPACE = "\u2581"  # "▁": how SentencePiece writes a space in its pieces
UNKNOWN = "\u2585"  # "▅": how its trainer writes characters that it leaves out
UNKNOWN_PENALTY = 10.0  # SentencePiece's kUnkPenalty: an unknown character scores this much below the lowest piece
# The pieces that unigram training finds depend on the number of threads, so it is the same on every machine.
TRAINING_THREADS = 4
# In characters, of up to 4 bytes each. SentencePiece silently skips longer training lines (`max_sentence_length`).
MAX_TRAINING_LINE = 1000
# At or above this size, a vocabulary too small for all characters of a text encodes the rarest as bytes.
MIN_SIZE_FOR_BYTES = 512


def train_sentencepiece(
    chunks: Iterable[str], kind: str, vocab_size: int, lossless: bool, add_eos: bool, share: float
) -> bytes:
    """Trains a model on a random `share` of the lines, always the same ones, and returns the bytes of its `.model` file.

    For the other arguments see `TokenizerConfig` and its method `train`.

    Raises:
        UserError: `vocab_size` is too small for the characters of the text, or the text has nothing to train on.
    """
    # The trainer would skip lines with the characters that it uses itself.
    separators = re.compile(f"[\n{SPACE}{UNKNOWN}]" if lossless else f"[\n{UNKNOWN}]")
    rng = random.Random(0)
    lines = [
        line[start : start + MAX_TRAINING_LINE]
        for text in chunks
        for line in separators.split(text)
        for start in range(0, len(line), MAX_TRAINING_LINE)
        if share == 1 or rng.random() < share
    ]
    options: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": vocab_size,
        "num_threads": TRAINING_THREADS,
        "max_sentence_length": 4 * MAX_TRAINING_LINE,
        "minloglevel": 2,
    }
    if lossless:
        options |= {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "byte_fallback": True,
            "character_coverage": 1.0,
            "user_defined_symbols": ["\n"],  # with "\n\n" as well, newlines could be split in several ways
            "required_chars": SPACE,  # without a piece for it, the bytes of a space would decode to "▁"
            "bos_id": -1,
            "eos_id": -1,
        }
    if add_eos:  # a control symbol, to which no text encodes
        options |= {"eos_id": 1 if lossless else 2, "eos_piece": END_OF_TEXT}
    rare_removed = False
    while True:
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
            return model.getvalue()
        except RuntimeError as error:
            message = str(error)
        if too_high := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
            options["vocab_size"] = size = int(too_high[1])
            warnings.warn(
                f"vocab_size {vocab_size:,} is more than this text can fill: training {size:,} pieces", stacklevel=2
            )
        elif too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            if rare_removed or not lossless or vocab_size < MIN_SIZE_FOR_BYTES:
                characters = f"the characters of this text{' and the 256 bytes' if lossless else ''}"
                raise UserError(
                    f"vocab_size {vocab_size:,} is too small: {characters} need at least {int(too_small[1]):,} pieces; "
                    "raise --data.tokenizer.vocab_size"
                )
            rare_removed, lines = True, _remove_rare_characters(lines, vocab_size)
        else:
            reason = "its sample has nothing but newlines" if "sentences_.empty()" in message else message
            remedy = "pass more text, or set --data.tokenizer.kind char"
            raise UserError(f"SentencePiece cannot be trained on this text ({reason}): {remedy}")


def _remove_rare_characters(lines: list[str], vocab_size: int) -> list[str]:
    """Splits lines at rare characters, which will be encoded as bytes, so that the others fill at most half of the
    pieces that are not bytes.

    SentencePiece itself can leave out 2% of a text at most.
    """
    counts = Counter(chain.from_iterable(lines))
    frequent = dict(counts.most_common((vocab_size - 256) // 2))
    warnings.warn(
        f"this text has {len(counts):,} different characters, too many for {vocab_size:,} pieces: the rarest, "
        f"{1 - sum(frequent.values()) / counts.total():.1%} of the text, are encoded as bytes; raise "
        "--data.tokenizer.vocab_size to avoid it",
        stacklevel=2,
    )
    rare = str.maketrans(dict.fromkeys(counts.keys() - frequent.keys(), "\n"))
    return [part for line in lines for part in line.translate(rare).split("\n") if part]


def split_chunks(chunks: Iterable[TextChunk], lossless: bool) -> tuple[list[str], list[str]]:
    """Splits text into parts for SentencePiece and the separator after each: "\\n", "", "▁" or `END_OF_TEXT`.

    A literal "▁" would decode to a space, so a lossless tokenizer encodes it as bytes.
    """
    parts, separators = list[str](), list[str]()
    for text, ends_document in chunks:
        lines = text.split("\n")
        if SPACE not in text and max(map(len, lines)) <= MAX_LINE:  # the usual case, three times as fast
            parts += lines
            separators += ["\n"] * len(lines)
        else:
            for line in lines:
                for short in split_long_line(line):
                    between_marks = short.split(SPACE) if lossless else [short]
                    parts += between_marks
                    separators += [SPACE] * (len(between_marks) - 1) + [""]
                separators[-1] = "\n"
        separators[-1] = END_OF_TEXT if ends_document else ""
    return parts, separators
