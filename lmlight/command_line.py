"""The table of `lmlight` commands, its help, and an argument parser with one-line errors.

Imports only lightweight modules.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from lmlight import files
from lmlight.errors import UserError

TRAINING = "lmlight.training.cli:main"  # takes the command's name, too
EXPORT = "lmlight.export.command"
COMMANDS = {  # what each does, and the function that runs it
    "fit": ("Train a model, resume a run (--ckpt_path) or finetune (--init_from).", TRAINING),
    "prepare": ("Train the tokenizer and encode a corpus, so that fit starts at once.", TRAINING),
    "validate": ("Score a checkpoint on the validation text.", TRAINING),
    "test": ("Score a checkpoint on the test text, with non-overlapping and with sliding windows.", TRAINING),
    "predict": ("Generate text from a checkpoint.", TRAINING),
    "play": ("Explore a model in a web page.", "lmlight.export.web:play"),
    "chat": ("Type prompts and watch the text stream.", "lmlight.commands.chat:main"),
    "sweep": ("Compare settings over several seeds, or search for the best.", "lmlight.sweep.command:main"),
    "curves": ("Plot the learning curves of several runs.", "lmlight.commands.curves:main"),
    "export": ("Convert a checkpoint for other engines: hf, gguf, onnx, torch, web.", f"{EXPORT}:export"),
    "import": ("Convert a Hugging Face model to a checkpoint.", f"{EXPORT}:import_"),
    "cache": ("List or clear cached corpora and tokens.", "lmlight.commands.cache:main"),
}


def usage() -> str:
    """The text of `lmlight --help`."""
    commands = "\n".join(f"  {name:<10}{text}" for name, (text, _) in COMMANDS.items())
    return f"""usage: lmlight COMMAND [options]

Train small transformer language models on text.

commands:
{commands}

`lmlight COMMAND --help` lists a command's options; `lmlight --version` prints the version."""


def program(name: str = "lmlight") -> str:
    """The shell command for a program installed in this environment, activated or not."""
    started = Path(sys.argv[0])
    if started.stem != "lmlight":  # python -m lmlight, or a notebook
        return join([sys.executable, "-m", "tensorboard.main" if name == "tensorboard" else name])
    found = shutil.which("lmlight")
    # without suffixes: Windows finds lmlight.exe, which may have been started as lmlight
    is_on_path = found is not None and Path(found).resolve().with_suffix("") == started.resolve().with_suffix("")
    return name if is_on_path else join([files.shown(started.with_name(name))])


def join(words: Iterable[str | Path]) -> str:
    """A command to paste into a shell, quoted by `shlex.join`, or with double quotes on Windows."""
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)(list(map(str, words)))


def counted(number: int, noun: str) -> str:
    """A number with its noun, to print: 1 text, 2,000 texts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def add_checkpoint_flags(self) -> None:
        """Add the flags of a command that opens a checkpoint: where to find it, and its user-defined classes."""
        self.add_argument("--runs", default="runs", help="folder in which to look for `best` and `last`")
        self.add_argument("--model.net", dest="net", metavar="CLASS", help="the class of your own network")
        self.add_argument("--data.tokenizer", dest="tokenizer", metavar="CLASS", help="the class of your own tokenizer")
