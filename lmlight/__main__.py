"""`lmlight` and `python -m lmlight`. Commands that do not need Lightning do not wait for its import, which takes seconds."""

import ctypes
import importlib
import io
import os
import platform
import sys
from collections.abc import Sequence

from lmlight.command_line import COMMANDS, TRAINING, usage
from lmlight.errors import UserError, say
from lmlight.version import __version__

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The command and its arguments; by default those of the process.

    Returns:
        The exit status: 0; 1 if stdout was closed, or no trial of a sweep succeeded; 2 without a command, or after a
        `UserError`, which is printed as one line; 130 if Ctrl-C interrupts a command other than `play`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # redirected on Windows, it cannot encode every character
            stream.reconfigure(errors="backslashreplace")
    command, *rest = list(sys.argv[1:] if args is None else args) or [""]
    if command in ("", "-h", "--help"):
        print(usage())
        return 0 if command else 2
    if command == "--version":
        print(f"lmlight {__version__}")
        return 0
    set_up_process(command)
    if "" not in sys.path:
        sys.path.append("")  # the current folder, for a user's own classes
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command '{command}': expected one of {', '.join(COMMANDS)}")
        _, target = COMMANDS[command]
        module, _, name = target.partition(":")
        run = getattr(importlib.import_module(module), name)
        return run([command, *rest] if target == TRAINING else rest) or 0
    except UserError as error:
        say(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        # otherwise the interpreter reports it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def set_up_process(command: str) -> None:
    """Set OpenMP and malloc options for a command; call it before torch is imported."""
    bound_spinning(command)
    if command == "fit":
        keep_freed_memory()


def bound_spinning(command: str) -> None:
    """Bound how long torch's OpenMP threads spin at barriers, in this process and those it starts, unless the user does.

    With libgomp's 300,000 spins, a busy process on the same two cores makes a step up to 30 times slower. With 1,000 spins,
    a step of the default model takes 187 ms alone (171 ms with 300,000) and 333 ms beside a busy process (2,361 ms with
    100,000). libgomp reads the bound when torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # generation computes only small products between barriers: a token takes 3.0 ms, against 3.6 to 6 with 1,000 spins
        os.environ["GOMP_SPINCOUNT"] = "10000" if command in ("chat", "predict") else "1000"


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation of this process, unless the user sets its thresholds.

    Otherwise glibc returns the memory of each step's large tensors to the system, which zeroes it on reuse: 9,000 to 14,000
    page faults per step of the default model, and up to a fifth of the step's time. The peak memory of a run stays the same.
    """
    variables = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    set_by_user = variables & os.environ.keys()
    if platform.libc_ver()[0] == "glibc" and not set_by_user:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


if __name__ == "__main__":
    sys.exit(main())
