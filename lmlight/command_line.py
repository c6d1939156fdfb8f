"""The commands of `lmlight`: their names and what each does, for help and errors. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from lmlight.errors import UserError

COMMANDS = {
    "fit": "Train a model, resume a run (--ckpt_path) or finetune (--init_from).",
    "prepare": "Train the tokenizer and encode a text, so that fit starts at once.",
    "validate": "Score a checkpoint on the validation text.",
    "test": "Score a checkpoint on the test text, also with a sliding window.",
    "predict": "Generate text from a checkpoint.",
    "chat": "Type prompts and watch the text stream.",
    "curves": "Plot the learning curves of several runs.",
    "export": "Convert a checkpoint for other engines: hf, gguf, onnx, torch.",
    "import": "Convert a Hugging Face model to a checkpoint.",
    "cache": "List or clear cached corpora and tokens.",
}


def usage() -> str:
    """What `lmlight --help` prints."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lmlight COMMAND [options]",
            "",
            "Train small transformer language models on text.",
            "",
            "commands:",
            *lines,
            "",
            "`lmlight COMMAND --help` lists a command's options; `lmlight --version` prints the version.",
        ]
    )


def unknown(name: str) -> UserError:
    """The error for a word that is no command."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(f"unknown command '{name}'{hint}: expected one of {', '.join(COMMANDS)}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage that argparse prints first."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")
