"""The one exception that stands for a user's mistake.

Everything that a user can get wrong raises `UserError` with one line: what was wanted, what arrived, what to do. The
command line says that line and exits with status 2; from Python it is a `ValueError`. Our own invariants are `assert`s.
"""

import sys


class UserError(ValueError):
    """Something that the user gave does not fit; the message says what to do about it."""


def say(error: Exception, kind: str = "error") -> None:
    """Prints a mistake on stderr as the one line that each of our commands gives."""
    print(f"lmlight: {kind}: {' '.join(str(error).split())}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """The first line of another library's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
