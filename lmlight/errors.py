"""`UserError`, the one exception for user errors, and how it is printed."""

import sys


class UserError(ValueError):
    """A user error. The message has one line: what was expected, what was found, and what to do.

    The command line prints it and exits with status 2. Our own invariants are `assert`s.
    """


def missing_extra(needs: str, extra: str) -> UserError:
    """The error for a package that is not installed; `needs` begins the message: "reading x needs the y package"."""
    return UserError(f'{needs}, which is not installed: pip install "lmlight[{extra}]"')  # quotes for any shell


def say(error: Exception, kind: str = "error") -> None:
    """Prints an error as one line on stderr."""
    print(f"lmlight: {kind}: {' '.join(str(error).split())}", file=sys.stderr)


def reason(error: Exception) -> str:
    """The cause of another library's error on one line: the system's words, the message's first line, or the class name."""
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
