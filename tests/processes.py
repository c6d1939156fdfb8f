"""Runs `lmlight` in other processes: in a new interpreter, or forked from a server that has imported everything.

A forked process has its own memory, signals and exit status, but starts without the seconds that imports take. The
server has run no test, so tests do not affect each other.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FORKING = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
FORKING.set_forkserver_preload(["lmlight.training.cli", "lmlight.pictures", "torch.utils.tensorboard"])
TIMEOUT = 100  # seconds; below the limit of pytest-timeout, which would not kill the process


def environment(**more):
    """This process's environment, with one torch thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **more}


def start(*arguments, code=None, script=None, **options):
    """Starts `lmlight ARGUMENTS`, or `code`, or the file `script`, in a new interpreter, and returns the Popen."""
    program = ["-c", code] if code else [script] if script else ["-m", "lmlight"]
    command = [sys.executable, *program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, **{"env": environment(), **pipes, **options})


def run_afresh(*arguments, status=0, typed=None, **options):
    """Runs it to its end, checks its exit status, and returns its stdout and stderr."""
    if typed is not None:
        options["stdin"] = subprocess.PIPE
    with start(*arguments, **options) as process:
        try:
            out, err = process.communicate(typed, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == status, err
    return out, err


def run(*arguments, status=0, code=None, cwd=".", env=None, timeout=TIMEOUT):
    """Runs `lmlight ARGUMENTS` or `code` in a forked process, checks its exit status, and returns its stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("out", "err")]
        args = (str(Path(cwd).absolute()), env or environment(), list(map(str, arguments)), code, written)
        process = FORKING.Process(target=_run_forked, args=args)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = (path.read_text("utf-8") if path.exists() else "" for path in written)
    assert process.exitcode == status, err
    return out, err


def _run_forked(folder, variables, arguments, code, written):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # it was read when the server imported torch
    for number, path in enumerate(written, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    sys.argv = ["-c" if code else "lmlight", *arguments]
    if code:
        exec(code, {"__name__": "__main__"})
    else:
        runpy.run_module("lmlight", run_name="__main__", alter_sys=True)
