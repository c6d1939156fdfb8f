"""Prompts: those that a user passes, and a default one from the validation text."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lmlight.data.tokenizer import CONTROL_CHARACTERS
from lmlight.errors import UserError, reason

# The default prompt appears as a tag in TensorBoard and in the command that `fit` prints when it finishes.
MAX_PROMPT_CHARS = 20


def first_line(text: str) -> str:
    """A prompt: the first words of the first whole line of `text`, without control characters or U+FFFD."""
    lines = [CONTROL_CHARACTERS.sub("", line).replace("\ufffd", "") for line in re.split("[\r\n]", text)]
    line = next((line for line in lines[1:-1] if line.strip()), lines[0]).strip()
    # keeps the text's own whitespace: a character tokenizer may not know a space
    words = re.match(rf".{{1,{MAX_PROMPT_CHARS}}}(?!\S)", line)
    return words[0].rstrip() if words else line[:MAX_PROMPT_CHARS]


def prompt_batches(prompts: Sequence[str] | str, batch_size: int, rank: int, world_size: int) -> list[list[str]]:
    """One rank's batches of prompts; the last one is empty on the ranks that would otherwise have fewer batches.

    The prompts are a list, or a file with one prompt per line; `-` reads standard input.

    Raises:
        UserError: there are no prompts; the file cannot be read or is not UTF-8; several processes read standard input.
    """
    if isinstance(prompts, str):
        prompts = _read_lines(prompts, world_size)
    if not prompts:
        raise UserError("there are no prompts: pass at least one in --data.prompts; an empty one starts a new text")
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    return (batches + [[]] * (-len(batches) % world_size))[rank::world_size]


def _read_lines(source: str, world_size: int) -> list[str]:
    if source == "-" and world_size > 1:
        raise UserError("several processes cannot share standard input: pass a file, --data.prompts prompts.txt")
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
        lines = re.split("\r?\n", content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        cause = "not UTF-8" if isinstance(error, UnicodeDecodeError) else reason(error)
        raise UserError(
            f"prompts file '{source}' cannot be read ({cause}): pass a UTF-8 file with "
            """one prompt per line, or a list: --data.prompts '["ROMEO:"]'"""
        ) from None
    return lines[:-1] if lines[-1] == "" else lines
