"""`lmlight chat CHECKPOINT`: type a line, see the verse stream. Does not wait for Lightning."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

import torch

from lmlight import checkpoint as checkpoints
from lmlight.command_line import Parser
from lmlight.errors import UserError
from lmlight.generation import Sampling, escape_control_characters, generate_text, start_streams
from lmlight.models import Net
from lmlight.user_code import import_class

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives `input` line editing)

HELP = """Type the beginning of a text; the model goes on. An empty line begins from nothing, \\n in it is a line break.
Ctrl-C stops the text, Ctrl-D or /quit ends. Settings:
"""


def main(args: Sequence[str]) -> None:
    """Runs the dialogue.

    Raises:
        UserError: no such checkpoint, or no such device.
    """
    parser = Parser("lmlight chat", description="The model continues what you type.")
    parser.add_argument(
        "checkpoint", nargs="?", default="best", help="a .ckpt file, a run's folder, or `best` or `last`"
    )
    parser.add_argument("--runs", default="runs", help="where `best` and `last` are looked for")
    parser.add_argument("--model.net", dest="net", metavar="CLASS", help="the class of your own network")
    parser.add_argument("--device", help="such as cuda or mps; a GPU is used where there is one")
    options = parser.parse_args(args)
    content = checkpoints.read(checkpoints.find(options.checkpoint, options.runs, "best"))
    device = options.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    trusted = import_class("--model.net", options.net, Net) if options.net else None
    net, tokenizer = checkpoints.text_model_of(content, trusted)
    try:
        net.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise UserError(f"device '{device}' cannot be used ({str(error).splitlines()[0]}): pass another") from None
    sampling = Sampling(**{**content[checkpoints.METADATA_KEY]["sampling"], "num_samples": 1})
    print(f"{net.num_parameters:,} weights on {device}. /help tells what can be typed.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of a line half typed
            print()
            continue
        if line.strip() in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            sampling = _command(line, sampling)
            continue
        try:
            streams = start_streams(tokenizer, [line.replace("\\n", "\n")], sampling)
            shown = streams[0].prompt
            print(escape_control_characters(shown), end="", flush=True)
            for _, piece in generate_text(net, streams, sampling):
                print(escape_control_characters(piece, after=shown), end="", flush=True)
                shown = piece
        except UserError as error:
            print(error, end="")
        except KeyboardInterrupt:
            pass  # of this text
        print("\n")
        sampling = replace(sampling, seed=sampling.seed + 1)  # the same line again gives another text


def _command(line: str, sampling: Sampling) -> Sampling:
    """What `/name value` makes of the settings; says what is wrong with it, or what there is."""
    name, _, value = line[1:].partition(" ")
    names = [field.name for field in fields(Sampling) if field.name != "num_samples"]
    if name not in names:
        print("" if name == "help" else f"there is no /{name}\n", end="")
        print(HELP + "\n".join(f"  /{known} {json.dumps(getattr(sampling, known))}" for known in names))
        return sampling
    try:
        return replace(sampling, **{name: _parsed(value, get_type_hints(Sampling)[name])})
    except (ValueError, UserError) as error:
        print(error)
        return sampling


def _parsed(text: str, kind: Any) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None if text.strip().lower() in ("", "none", "off") else text
    if kind == list[str]:
        return [] if value is None else value if isinstance(value, list) else [str(value)]
    if kind in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = getattr(kind, "__name__", str(kind))
        raise ValueError(f"a value of type {wanted} is wanted, got {text!r}")
    return value
