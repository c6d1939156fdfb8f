"""`lmlight` and `python -m lmlight`: commands that need no Lightning, which takes seconds to import, do not wait for it."""

import importlib
import os
import sys

import lmlight

LIGHT = {
    "cache": ("lmlight.cache", "main"),
    "chat": ("lmlight.chat", "main"),
    "curves": ("lmlight.curves", "main"),
    "export": ("lmlight.interchange.command", "export"),
    "import": ("lmlight.interchange.command", "import_"),
}


def main() -> int:
    """Runs the command that was typed; the exit status."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("chat", "predict") and lmlight.bounds_spinning:
        # Between the short products of a token the threads do better to wait awake: 3.0 ms a token in place of 3.6 to 6.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        if command in LIGHT:
            module, function = LIGHT[command]
            status: int = getattr(importlib.import_module(module), function)(sys.argv[2:])
            return status
        from lmlight import cli

        return cli.main()
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        # or the interpreter says so once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
