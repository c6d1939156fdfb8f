"""`lmlight` and `python -m lmlight`: commands that need no Lightning, which takes seconds to import, do not wait for it."""

import os
import sys

import lmlight


def main() -> int:
    """Runs the command that was typed; the exit status."""
    if sys.argv[1:2] in (["chat"], ["predict"]) and lmlight.bounds_spinning:
        # Between the short products of a token the threads do better to wait awake: 3.0 ms a token in place of 3.6 to 6.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    if sys.argv[1:2] == ["chat"]:
        from lmlight import chat

        return chat.main(sys.argv[2:])
    if sys.argv[1:2] == ["curves"]:
        from lmlight import curves

        return curves.main(sys.argv[2:])
    if sys.argv[1:2] in (["export"], ["import"]):
        from lmlight.interchange import command

        return (command.export if sys.argv[1] == "export" else command.import_)(sys.argv[2:])
    from lmlight import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
