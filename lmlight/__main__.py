"""`lmlight` and `python -m lmlight`: commands that need no Lightning, which takes seconds to import, do not wait for it."""

import importlib
import os
import sys

import lmlight

LIGHT = {"cache": "lmlight.cache", "chat": "lmlight.chat", "curves": "lmlight.curves"}


def main() -> int:
    """Runs the command that was typed; the exit status."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("chat", "predict") and lmlight.bounds_spinning:
        # Between the short products of a token the threads do better to wait awake: 3.0 ms a token in place of 3.6 to 6.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        if command in LIGHT:
            status: int = importlib.import_module(LIGHT[command]).main(sys.argv[2:])
            return status
        from lmlight import cli

        return cli.main()
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter says so once more as it ends
        return 1


if __name__ == "__main__":
    sys.exit(main())
