"""`lmlight` and `python -m lmlight`: commands that need no Lightning, which takes seconds to import, do not wait for it."""

import sys


def main() -> int:
    """Runs the command that was typed; the exit status."""
    if sys.argv[1:2] == ["chat"]:
        from lmlight import chat

        return chat.main(sys.argv[2:])
    from lmlight import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
