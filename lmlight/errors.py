"""`UserError`, the one exception for user errors, and how it is printed."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A user error. The message has one line: what was expected, what was found, and what to do.

    The command line prints it and exits with status 2. Our own invariants are `assert`s.
    """


def missing_extra(needs: str, extra: str) -> UserError:
    """The error for a package that is not installed; `needs` begins the message: "reading x needs the y package"."""
    return UserError(f'{needs}, which is not installed: pip install "lmlight[{extra}]"')  # quotes for any shell


def check_literals(annotated: Callable[..., Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a `UserError` if a value is not one that the `Literal` annotation of its parameter or field allows."""
    for name, hint in get_type_hints(annotated).items():
        kinds = (hint, *get_args(hint))  # including a union's members
        expected = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        others = tuple(kind for kind in kinds if isinstance(kind, type) and get_origin(kind) is None)
        if expected and values[name] not in expected and not isinstance(values[name], others):
            expected += [kind.__name__ for kind in others]
            raise UserError(f"{prefix}{name} must be one of {', '.join(map(str, expected))}, got {values[name]!r}")


def say(error: Exception, kind: str = "error") -> None:
    """Prints an error as one line on stderr."""
    print(f"lmlight: {kind}: {' '.join(str(error).split())}", file=sys.stderr)


def reason(error: Exception) -> str:
    """The cause of a library's error on one line: the OS error message, the message's first line, or the class name."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
