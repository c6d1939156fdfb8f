"""The one exception that stands for a user's mistake.

Everything that a user can get wrong raises `UserError` with one line: what was wanted, what arrived, what to do. The
command line prints that line and exits with status 2; from Python it is a `ValueError`. Our own invariants are `assert`s.
"""


class UserError(ValueError):
    """Something that the user gave does not fit; the message says what to do about it."""
