"""Pretrained tokenizers: SentencePiece models, and any Hugging Face `tokenizer.json`, through `tokenizers`."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lmlight.data.tokenizer import PROBE, SentencePieceTokenizer, Tokenizer, starts_character
from lmlight.errors import UserError, missing_extra, reason

# Byte-level BPE (GPT-2) writes printable bytes as themselves and the others as U+0100 and up. This pattern matches UTF-8
# continuation bytes, 0x80 to 0xBF.
CONTINUING = re.compile("[¡-¬®-¿\u0122-\u0143]")


def read_pretrained(path: Path) -> Tokenizer:
    """The tokenizer in a file: a SentencePiece `.model`, or `tokenizer.json`; a `tokenizer_config.json` beside it names EOS.

    Raises:
        UserError: the file cannot be read, or is neither.
    """
    path = path.expanduser()
    try:
        data = path.read_bytes()
        if path.suffix != ".json":
            return SentencePieceTokenizer(data)
        content = json.loads(data)
        settings = path.with_name("tokenizer_config.json")
        eos = json.loads(settings.read_bytes()).get("eos_token") if settings.is_file() else None
        eos = eos["content"] if isinstance(eos, dict) else eos
        ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return HFTokenizer(json.dumps({**content, "lmlight_eos_id": ids.get(eos)}, ensure_ascii=False).encode())
    except UserError:
        raise
    except Exception as error:  # from the tokenizers package, or because the content is something else
        cause = reason(error)
    raise UserError(
        f"tokenizer '{path}' cannot be read ({cause}): pass a Hugging Face tokenizer.json, a SentencePiece .model file, "
        "or the full name of your own class, such as my.module.MyTokenizer"
    )


class HFTokenizer(Tokenizer):
    """A tokenizer in Hugging Face's format: byte-level BPE (GPT-2, Qwen, SmolLM2), Unigram, WordPiece and others.

    Special tokens in a text are encoded like any other text.

    Args:
        data: the content of `tokenizer.json`, with the id of the EOS token as `lmlight_eos_id`.

    Attributes:
        content: the parsed `tokenizer.json`.

    Raises:
        UserError: the package `tokenizers` is not installed.
        ValueError: `data` is not a tokenizer.
    """

    def __init__(self, data: bytes) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise missing_extra("a tokenizer.json needs the tokenizers package", "hf") from None
        self._data = data
        try:
            self.content: dict[str, Any] = json.loads(data)
            self.eos_id = self.content.pop("lmlight_eos_id", None)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.content))
        except Exception as error:  # the library raises bare `Exception`s
            raise ValueError(f"not a tokenizer.json: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        is_special = {token["id"]: token["special"] for token in self.content.get("added_tokens", [])}
        is_byte_level = '"ByteLevel"' in json.dumps(self.content.get("decoder"))
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.char_counts = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)
        for piece, index in vocabulary.items():
            if index not in is_special:
                self.char_counts[index] = _characters(piece, is_byte_level)
            elif not is_special[index]:  # literal text
                self.char_counts[index] = len(piece)
        model = self.content["model"]
        unknown = vocabulary.get(model.get("unk_token"), model.get("unk_id"))
        if unknown is not None:
            self.char_counts[unknown] = 1  # at least: it may stand for several characters
        if self.eos_id is not None:
            self.char_counts[self.eos_id] = 0
        self.lossless = all(
            self.decode(ids := self.encode(text)) == text and self.char_counts[ids].sum() == len(text)
            for text in (PROBE, PROBE.strip())
        )

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def id_to_piece(self, index: int) -> str:
        return str(self._tokenizer.id_to_token(index))

    def to_bytes(self) -> bytes:
        return self._data


def _characters(piece: str, is_byte_level: bool) -> int:
    if is_byte_level:
        return len(CONTINUING.sub("", piece))
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return int(starts_character(int(piece[3:5], 16)))
    return len(piece.removeprefix("##"))
