"""One trial: `lmlight fit` in a process of its own, which stops and saves its state if the sweep's process exits.

That process runs this module. Its standard input is a pipe from the sweep; once the pipe is closed, deliberately or because
the sweep was killed, the run gets SIGTERM. This works on every platform. The process does not see the terminal's Ctrl-C,
which would reach it as a second signal.
"""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmlight import checkpoint
from lmlight.commands import curves

METRIC = "val/nats_per_char"
LAST = "checkpoints/last.ckpt"
LOG = "log.txt"  # what the runs of a trial print
STOPPED = [sign * number + base for number in (signal.SIGINT, signal.SIGTERM) for sign, base in ((1, 128), (-1, 0))]
Validations = list[dict[str, float]]


class TrialFailed(Exception):
    """A run ended without a result; the message is the reason."""


def run_fit(folder: Path, args: Sequence[str], watch: Callable[[int, Validations], bool]) -> dict[str, Any] | None:
    """Train, or resume the interrupted run in a trial's folder.

    Args:
        folder: The trial's folder, for the run's own folder and its output.
        args: The arguments of `lmlight fit`.
        watch: Called twice a second with the process's id and the validations so far. The run stops if it returns False.

    Returns:
        The loss at the last validation as `METRIC`, the number of `characters` scored, `seconds` of training, and the number
        of `parameters` if the run has a checkpoint; None if it was stopped.

    Raises:
        TrialFailed: The run ended with an error or without a validation.
        KeyboardInterrupt: On Ctrl-C or SIGTERM to the sweep or the run, once the run has stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if run := run_folder(folder):
        if (run / LAST).is_file():
            args = [f"--ckpt_path={run / LAST}"]
        else:
            shutil.rmtree(run)
    with (folder / LOG).open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, "fit", *args, f"--trainer.default_root_dir={folder}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},  # encoding of the log
        )
    try:
        while process.poll() is None:
            if not watch(process.pid, validations(folder)):
                _stop(process)
                return None
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    except BaseException as error:  # any exception: the process must not outlive its sweep
        if isinstance(error, KeyboardInterrupt):
            print("Stopping the run, which saves a checkpoint; another Ctrl-C ends it at once", flush=True)
        _stop(process)
        raise
    if process.returncode in STOPPED:
        raise KeyboardInterrupt
    if process.returncode:
        raise TrialFailed(_reason(process.returncode, (folder / LOG).read_bytes()[start:].decode(errors="replace")))
    run, rows = run_folder(folder), validations(folder)
    if not (run and rows):
        raise TrialFailed(f"there is no {METRIC} in the run's metrics.csv")
    watch(process.pid, rows)
    last, final = rows[-1], checkpoint.read(run / LAST) if (run / LAST).is_file() else None
    if final and final["global_step"] > last["step"]:  # with max_epochs, for example
        raise TrialFailed(
            f"the final model, at step {final['global_step']}, was not validated: change val_check_interval"
        )
    values = {METRIC: last[METRIC], "characters": last.get("val/characters"), "seconds": last["seconds"]}
    return {**values, "parameters": final[checkpoint.METADATA_KEY].get("num_parameters") if final else None}


def run_folder(folder: Path) -> Path | None:
    """The folder of a trial's run, which is named after its start time. A logger may create another folder beside it."""
    return max((path for path in folder.glob("[0-9]*") if path.is_dir()), default=None)


def validations(folder: Path) -> Validations:
    """The validations of a trial's run so far."""
    run = run_folder(folder)
    return curves.read(run, "seconds") if run else []


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
        while process.poll() is None:  # it writes a checkpoint; on Windows, Ctrl-C does not interrupt `wait`
            time.sleep(0.1)
    except BaseException:  # a second Ctrl-C, or any other interruption
        process.kill()
        raise


def _reason(status: int, output: str) -> str:
    """Why a run failed, from what it printed: an error message, or the last line."""
    if status < 0:
        hint = " (perhaps out of memory)" if -status == getattr(signal, "SIGKILL", 0) else ""
        names = {number.value: number.name for number in signal.Signals}  # not those of real-time signals
        return f"ended by {names.get(-status, f'signal {-status}')}{hint}"
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"lmlight: error: |[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or [f"exit status {status}"])[-1].removeprefix("lmlight: error: ").strip()


def _stop_with_parent(pipe: int) -> None:
    # not `sys.stdin`, whose lock the interpreter would wait for as it exits
    while os.read(pipe, 1):
        pass
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, args=[os.dup(0)], daemon=True).start()
    # the run's own processes must not inherit a pipe that is being read: on Windows, they would wait for it as they start
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    runpy.run_module("lmlight", run_name="__main__", alter_sys=True)
