"""Processes of `lmlight`: started afresh, as a user does; or forked, which spares each the seconds that imports take.

A forked one is as real: its own memory, signals and exit status. It begins where
`import lmlight.training.cli` ends, in a server that has run no test, so that nothing of one test reaches another.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from lmlight.data.token_store import nameless_main

FORKING = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
FORKING.set_forkserver_preload(["lmlight.training.cli", "lmlight.pictures", "torch.utils.tensorboard"])
LONGEST = 100  # seconds: below pytest's own limit, which would leave the process behind


def environment(**more):
    """This process's, with one thread to each other one."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(*arguments, code=None, script=None, **options):
    """`lmlight ARGUMENTS` in a new interpreter, as a Popen; `code`, or a file of it, stands in for the command."""
    what = ["-c", code] if code else [script] if script else ["-m", "lmlight"]
    command = [sys.executable, *what, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"env": environment(), **pipes, **options})


def run_afresh(*arguments, status=0, typed=None, **options):
    """The same to its end: what it wrote to stdout and stderr."""
    if typed is not None:
        options["stdin"] = subprocess.PIPE
    with start(*arguments, **options) as process:
        try:
            out, err = process.communicate(typed, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == status, err
    return out, err


def run(*arguments, status=0, code=None, cwd=".", env=None, longest=LONGEST):
    """`lmlight ARGUMENTS`, forked, to its end: what it wrote to stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("out", "err")]
        what = (str(Path(cwd).absolute()), env or environment(), list(map(str, arguments)), code, written)
        process = FORKING.Process(target=_begin, args=what)
        with nameless_main():  # whatever has started pytest is not run again
            process.start()
        process.join(longest)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = (path.read_text("utf-8") if path.exists() else "" for path in written)
    assert process.exitcode == status, err
    return out, err


def _begin(folder, variables, arguments, code, written):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(written, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["-c" if code else "lmlight", *arguments]
    if code:
        exec(code, {"__name__": "__main__"})
    else:
        runpy.run_module("lmlight", run_name="__main__", alter_sys=True)
