"""`lmlight` and `python -m lmlight`: commands that need no Lightning, which takes seconds to import, do not wait for it."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

import lmlight
from lmlight.command_line import COMMANDS, unknown, usage
from lmlight.errors import UserError, say

LIGHT = {
    "cache": ("lmlight.commands.cache", "main"),
    "chat": ("lmlight.commands.chat", "main"),
    "curves": ("lmlight.commands.curves", "main"),
    "export": ("lmlight.export.command", "export"),
    "import": ("lmlight.export.command", "import_"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: the words after `lmlight`; None takes them from the process.

    Returns:
        the exit status: 0; 2 for a user's mistake, which is said in one line on stderr, and if no command is given.
    """
    args = sys.argv[1:] if args is None else list(args)
    command = args[0] if args else ""
    if command in ("", "-h", "--help"):
        print(usage())
        return 0 if command else 2
    if command == "--version":
        print(f"lmlight {lmlight.__version__}")
        return 0
    if command in ("chat", "predict") and lmlight.bounds_spinning:
        # Between the short products of a token the threads do better to wait awake: 3.0 ms a token in place of 3.6 to 6.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        if command not in COMMANDS and not command.startswith("-"):  # a command may follow options, such as --config
            raise unknown(command)
        if command not in LIGHT:
            from lmlight.training import cli

            return cli.main(args)
        module, name = LIGHT[command]
        run: Callable[[Sequence[str]], None] = getattr(importlib.import_module(module), name)
        run(args[1:])
        return 0
    except UserError as error:
        say(error)
        return 2
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        # or the interpreter says so once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
