"""A sweep: a folder with an Optuna study, in a journal file, and the runs of its trials.

- Trials are claimed under a lock, so that any number of processes, on any machines, run each of them once.
- A process that runs a trial touches the trial's heartbeat file. The trial of a process that has died is queued again, and
  its run resumed. (Optuna itself needs a database for this, and lists such a trial twice: first as failed.)
"""

import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import psutil
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from lmlight import files
from lmlight.errors import UserError, reason

Params = Mapping[str, Any]  # the varied flags of a trial, by name, and `SEED`
JOURNAL = "journal.log"
SEED = "seed_everything"
STALE_SECONDS = 120  # network file systems may show the time of a file a minute late
HOST = f"{socket.gethostname()}-{uuid.getnode():x}"  # containers may share a name


class Plan(NamedTuple):
    """What a sweep runs: the distribution of each parameter, and for a search its number of trials and its seed."""

    space: Mapping[str, BaseDistribution]
    n_trials: int | None  # None: the trials that are queued
    seed: int
    is_unchanged: Callable[[Params], bool]  # whether a trial's settings are those that the sweep began with


class Study:
    """The sweep in a folder.

    Args:
        folder: Its folder.
        settings: What is compared or searched; None opens an existing sweep to read it.

    Raises:
        UserError: There is no sweep, or one with other settings; the folder cannot be written, or its journal is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None) -> None:
        if settings is None and not (folder / JOURNAL).is_file():
            raise UserError(f"there is no sweep in '{folder}': pass its folder, such as sweeps/NAME")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder = folder
        # Optuna's default, a symlink lock, needs a privilege on Windows
        self._lock = JournalFileOpenLock(str(folder / "claims"))
        self._last_beat: tuple[Path, str] | None = None
        journal = folder / JOURNAL
        try:
            if settings is not None:
                folder.mkdir(parents=True, exist_ok=True)
                _repair(journal)
            storage = JournalStorage(JournalFileBackend(str(journal), JournalFileOpenLock(str(journal))))
            pruner = optuna.pruners.MedianPruner()
            if settings is None:
                self.optuna = optuna.load_study(study_name="sweep", storage=storage, pruner=pruner)
            else:
                self.optuna = optuna.create_study(
                    study_name="sweep", storage=storage, pruner=pruner, load_if_exists=True
                )
                with self.locked():
                    if "settings" not in self.optuna.user_attrs:
                        self.optuna.set_user_attr("settings", settings)
            self.settings: dict[str, Any] = self.optuna.user_attrs["settings"]
        except (OSError, KeyError, ValueError, AssertionError) as error:  # also from a damaged journal
            raise UserError(f"the sweep in '{folder}' cannot be used ({reason(error)}): pass another folder") from None
        if settings is not None and settings["identity"] != self.settings["identity"]:
            raise UserError(f"'{folder}' is a sweep of other settings: pass another --study, or leave it out")

    def enqueue(self, grid: Sequence[Params], retry: bool = False) -> None:
        """Queue the trials that the sweep lacks and, with `retry`, those that failed."""
        with self.locked():
            if retry:
                for trial in self.trials(TrialState.FAIL):
                    self._requeue(trial)
            known = [trial.user_attrs.get("queued") for trial in self.trials()]
            for params in grid:
                if params not in known:
                    self.optuna.enqueue_trial(dict(params), user_attrs={"queued": dict(params)})

    def claim(self, plan: Plan) -> Trial | None:
        """Take the next trial, for this process to run; None if there is none left."""
        with self.locked():
            for running in self.trials(TrialState.RUNNING):
                if self._is_stale(running):
                    self._requeue(running)
            known = len(self.trials())
            if not self.trials(TrialState.WAITING) and known >= (plan.n_trials or 0):
                return None
            # a different seed for each trial, because processes that start together would otherwise try the same values
            self.optuna.sampler = optuna.samplers.TPESampler(seed=plan.seed + known, constant_liar=True)
            trial = self.optuna.ask(dict(plan.space))
            self.beat(trial)
            return trial

    def release(self, trial: Trial) -> None:
        """Requeue a trial whose run was interrupted."""
        with self.locked():
            for running in self.trials(TrialState.RUNNING):
                if running.number == trial.number:
                    self._requeue(running)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states, by default in any. A trial that was queued again counts once."""
        trials = self.optuna.get_trials(deepcopy=False)
        again = {trial.user_attrs.get("continues") for trial in trials}
        return [trial for trial in trials if trial.number not in again and (not states or trial.state in states)]

    def trial_folder(self, trial: Trial | FrozenTrial) -> Path:
        return self.folder / "trials" / str(trial.user_attrs.get("folder", trial.number))

    def fit_args(self, params: Params) -> list[str]:
        """The arguments of `lmlight fit` for a trial."""
        return [*self.settings["fit"], *flags(params)]

    def beat(self, trial: Trial, pid: int | None = None) -> None:
        """Update the trial's heartbeat, which shows that this process and process `pid` are running it."""
        path = self.trial_folder(trial) / "heartbeat"
        beat = path, " ".join([HOST, *(f"{one}:{_started(one)}" for one in (os.getpid(), pid or os.getpid()))])
        if beat == self._last_beat:
            path.touch()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.whole(path) as beside:  # an empty file would look like a dead process
                beside.write_text(beat[1], encoding="utf-8")
            self._last_beat = beat

    def _is_stale(self, trial: FrozenTrial) -> bool:
        path, clock = self.trial_folder(trial) / "heartbeat", self.folder / "clock"
        clock.touch()  # sets it to the file system's time, which may be another machine's
        try:
            host, *processes = path.read_text("utf-8").split() or [""]
            age = clock.stat().st_mtime - path.stat().st_mtime
        except OSError:
            return True  # its process died before the first beat: a claim holds the lock until then
        if host == HOST:  # a suspended process is alive
            return not any(
                started and started == _started(int(pid)) for pid, started in (one.split(":") for one in processes)
            )
        return not host or age > STALE_SECONDS

    def _requeue(self, trial: FrozenTrial) -> None:
        queued = {**trial.user_attrs.get("queued", {}), **trial.params}
        attrs = {"queued": queued, "folder": self.trial_folder(trial).name, "continues": trial.number}
        self.optuna.enqueue_trial(queued, user_attrs=attrs)
        if not trial.state.is_finished():
            self.optuna.tell(trial.number, state=TrialState.FAIL)

    def locked(self) -> AbstractContextManager[None]:
        return _held(self._lock)


@contextmanager
def _held(lock: JournalFileOpenLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _started(pid: int) -> str:
    """When a process started, which distinguishes it from a later one with the same PID; empty if it is not alive."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return ""


def _repair(journal: Path) -> None:
    """Cut off a last line that a full disk or a power cut has left incomplete."""
    if journal.is_file():
        with _held(JournalFileOpenLock(str(journal))):  # another process may be writing its last line
            content = journal.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(journal, content.rfind(b"\n") + 1)


def flags(params: Params) -> list[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in params.items()]
