"""Worker processes for CPU-bound work."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager

from lmlight.errors import UserError


def cpu_count() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(processes: int) -> ProcessPoolExecutor:
    """A pool whose processes ignore Ctrl-C and end when the parent is killed.

    Except on Linux, processes are spawned and import the main module: a script needs `if __name__ == "__main__"`.
    """
    if sys.platform == "win32":
        processes = min(processes, 61)  # the limit of ProcessPoolExecutor there
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(processes, context, _start)


@contextmanager
def killed_workers_reported() -> Iterator[None]:
    """Raises a `UserError` if a process of a pool that the block uses has been killed."""
    try:
        yield
    except BrokenExecutor as error:
        remedy = "close other programs and start again; during training, lower --data.num_workers"
        raise UserError(f"a worker process was killed, probably because memory ran out: {remedy}") from error


def ignore_ctrl_c(worker: int = 0) -> None:
    """Leaves Ctrl-C, which the terminal sends to all processes, to the parent; for DataLoader workers, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start() -> None:
    ignore_ctrl_c()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler of the training process
    if hasattr(os, "setsid"):
        os.setsid()  # signals to the parent's process group reach the parent only
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
