"""`UserError`, the one exception for user errors, and how it is printed."""

import sys


class UserError(ValueError):
    """A user error. The message has one line: what was expected, what was found, and what to do.

    The command line prints it and exits with status 2. Our own invariants are `assert`s.
    """


def missing_extra(needs: str, extra: str) -> UserError:
    """The error for a package that is not installed; `needs` begins the message: "reading x needs the package y"."""
    return UserError(f'{needs}, which is not installed: pip install "lmlight[{extra}]"')  # quotes for any shell


def say(error: Exception, kind: str = "error") -> None:
    """Prints an error as one line on stderr."""
    print(f"lmlight: {kind}: {' '.join(str(error).split())}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """The first line of another library's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
