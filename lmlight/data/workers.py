"""Worker processes for CPU-bound work.

`multiprocessing` imports the parent's main module into every process that it spawns, which runs a user's script again
unless it has an `if __name__ == "__main__"` guard. These workers are plain subprocesses that read pickled calls from
stdin. They exit when stdin closes, which also happens when the parent is killed.

Free of torch.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

START = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from lmlight.data.workers import serve; serve()"


def cpu_count() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """Runs functions in other processes, like `concurrent.futures.ProcessPoolExecutor`.

    Args:
        processes: the number of processes. Each one starts when it is first needed.
        initializer: called first in each process.
        arguments: for `initializer`.
    """

    def __init__(self, processes: int, initializer: Callable[..., object], *arguments: object) -> None:
        self.processes = processes
        self._initial_call = pickle.dumps((initializer, arguments))
        self._threads = ThreadPoolExecutor(processes)  # each thread talks to a process of its own
        self._own = threading.local()
        self._workers: list[subprocess.Popen[bytes]] = []

    def submit(self, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Schedules a call. The function must be importable by name, and not from the main module."""
        return self._threads.submit(self._call, function, arguments)

    def shutdown(self) -> None:
        """Cancels pending calls, waits for running ones and ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            with worker, suppress(BrokenPipeError):
                assert worker.stdin is not None
                worker.stdin.close()

    def _call(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
        if not hasattr(self._own, "worker"):
            self._own.worker = self._start()
        worker: subprocess.Popen[bytes] = self._own.worker
        assert worker.stdin is not None and worker.stdout is not None
        try:
            pickle.dump((function, arguments), worker.stdin)
            worker.stdin.flush()
            result, error = pickle.load(worker.stdout)
        except (BrokenPipeError, EOFError):
            raise RuntimeError(f"a worker process ended unexpectedly (exit status {worker.wait()})") from None
        if error is not None:
            raise error
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", START, os.pathsep.join(sys.path)]
        # a session of its own: Ctrl-C reaches the parent only
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert worker.stdin is not None
        worker.stdin.write(self._initial_call)
        self._workers.append(worker)
        return worker


def serve() -> None:
    """The main loop of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps prints out of the results
    calls = sys.stdin.buffer
    with suppress(EOFError, BrokenPipeError):
        initializer, arguments = pickle.load(calls)
        initializer(*arguments)
        while True:
            function, arguments = pickle.load(calls)
            try:
                answer: tuple[Any, Exception | None] = (function(*arguments), None)
            except Exception as error:
                answer = (None, error)
            pickle.dump(answer, results)
            results.flush()
