"""Prompts: those that a user passes, and a default one from the validation text. Free of torch."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lmlight.data.tokenizer import CONTROL_CHARACTERS
from lmlight.errors import UserError

# The default prompt appears as a tag in TensorBoard and in the command that `fit` prints at its end.
MAX_PROMPT_CHARS = 20
ZERO_WIDTH_JOINER = "\u200d"


def first_line(text: str) -> str:
    """A prompt from `text`: the beginning of its first whole line, without control characters or broken ones."""
    lines = [CONTROL_CHARACTERS.sub("", line).replace("\ufffd", "") for line in re.split("[\r\n]", text)]
    return first_words(next((line for line in lines[1:-1] if line.strip()), lines[0]).strip())


def first_words(line: str) -> str:
    """The first words of a line, at most `MAX_PROMPT_CHARS` characters. A longer first word is cut between characters."""
    if len(line) <= MAX_PROMPT_CHARS:
        return line
    end = line.rfind(" ", 1, MAX_PROMPT_CHARS + 1)
    if end == -1:
        end = MAX_PROMPT_CHARS
        while end > 1 and (_extends(line[end]) or line[end - 1] == ZERO_WIDTH_JOINER):
            end -= 1
    return line[:end].rstrip()


def _extends(character: str) -> bool:
    """Whether a character modifies the one before it: a combining mark, a joiner or the skin tone of an emoji."""
    return unicodedata.category(character)[0] == "M" or character == ZERO_WIDTH_JOINER or "🏻" <= character <= "🏿"


def read_prompts(prompts: Sequence[str] | str) -> list[str]:
    """A list of prompts as it is, or the lines of a file; `-` is the standard input.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    if not isinstance(prompts, str):
        return list(prompts)
    try:
        content = sys.stdin.buffer.read() if prompts == "-" else Path(prompts).expanduser().read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts file '{prompts}' cannot be read ({getattr(error, 'strerror', 'not UTF-8')}): pass a UTF-8 file with "
            """one prompt per line, or a list: --data.prompts '["ROMEO:"]'"""
        ) from None
    lines = [line.removesuffix("\r") for line in lines]
    return lines[:-1] if lines[-1] == "" else lines


def prompt_batches(prompts: Sequence[str] | str, batch_size: int, rank: int, world_size: int) -> list[list[str]]:
    """One rank's batches of prompts; the last one is empty on the ranks that would otherwise have fewer batches.

    Raises:
        UserError: see `read_prompts`; several processes read the standard input.
    """
    if prompts == "-" and world_size > 1:
        raise UserError("several processes cannot share the standard input: pass a file, --data.prompts prompts.txt")
    prompts = read_prompts(prompts)
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    return (batches + [[]] * (-len(batches) % world_size))[rank::world_size]
