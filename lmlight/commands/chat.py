"""`lmlight chat CHECKPOINT`: streams a continuation of each line that you type.

Avoids importing Lightning, which takes seconds.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from jsonargparse import ArgumentParser

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.command_line import Parser
from lmlight.errors import UserError, reason
from lmlight.generation import Sampling, escape_control_characters, generate_text, start_streams

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives `input` line editing)

HELP = """Type the beginning of a text. An empty line generates without a prompt; \\n in a line is a line break.
Ctrl-C stops generating, Ctrl-D or /quit exits. Settings, such as /temperature 0.7:"""


def main(args: Sequence[str]) -> None:
    """Runs `lmlight chat`."""
    parser = Parser("lmlight chat", description="The model continues what you type.")
    parser.add_argument("checkpoint", nargs="?", default="best", help="a .ckpt file, a run's folder, `best` or `last`")
    parser.add_checkpoint_flags()
    parser.add_argument("--device", help="such as cuda or mps; by default, a GPU if there is one")
    options = parser.parse_args(args)
    path = checkpoints.find(options.checkpoint, options.runs, "best")
    content = checkpoints.read(path)
    device = options.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    trusted, _ = checkpoints.import_classes(options.net, options.tokenizer)
    net, tokenizer = checkpoints.text_model_of(content, trusted)
    try:
        net.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise UserError(f"device '{device}' cannot be used ({reason(error)}): pass another") from None
    sampling = Sampling(**{**content[checkpoints.METADATA_KEY]["sampling"], "num_samples": 1})
    print(f"{files.shown(path)}: {net.num_parameters:,} parameters on {device}. /help lists the commands.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops the line
            print()
            continue
        if line.strip() in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                sampling = _changed(sampling, line)
                continue
            streams = start_streams(tokenizer, [line.replace("\\n", "\n")], sampling)
            shown = streams[0].prompt
            print(escape_control_characters(shown), end="", flush=True)
            for _, piece in generate_text(net, streams, sampling):
                print(escape_control_characters(piece, after=shown), end="", flush=True)
                shown = piece
        except UserError as error:
            print(error, end="")
        except KeyboardInterrupt:
            pass  # stops this text only
        print("\n")
        sampling = replace(sampling, seed=(sampling.seed + 1) % 2**64)  # repeating a line generates different text


def _changed(sampling: Sampling, line: str) -> Sampling:
    """The settings after `/name value`; an unknown name prints them all."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Sampling, skip={"num_samples"})
    name, _, value = line[1:].partition(" ")
    settings = {key: getattr(sampling, key) for key in vars(parser.get_defaults())}
    if name not in settings:
        print(HELP, *(f"  /{key} {setting}" for key, setting in settings.items()), sep="\n")
        return sampling
    try:
        return replace(sampling, **{name: parser.parse_args([f"--{name}={value}"])[name]})
    except Exception as error:
        print(" ".join(str(error).split()))
        return sampling
