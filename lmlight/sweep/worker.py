"""Runs the trials of a sweep, one after the other, until none is left."""

import statistics
import time
from datetime import timedelta

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from lmlight.command_line import counted
from lmlight.errors import UserError, reason
from lmlight.sweep.report import best_of, brief, settings_of
from lmlight.sweep.study import Plan, Study
from lmlight.sweep.trial import METRIC, TrialFailed, Validations, run_fit


def work(study: Study, plan: Plan) -> bool:
    """Run trials until none is left, here or in another process; returns False if Ctrl-C or SIGTERM ended it.

    Raises:
        UserError: The settings have changed, or the sweep's folder cannot be written.
    """
    print(f"Sweep in {study.folder}: {counted(_count(study, plan), 'trial')}", flush=True)
    is_waiting = False
    try:
        while (trial := study.claim(plan)) or study.trials(TrialState.RUNNING):
            if trial is None:
                if not is_waiting:
                    print("Waiting for the trials of other processes", flush=True)
                is_waiting = True
                time.sleep(1)
            else:
                began = time.monotonic()
                result = run_trial(study, trial, plan)
                print(_progress(study, plan, trial, result, time.monotonic() - began), flush=True)
    except KeyboardInterrupt:
        left = _count(study, plan) - sum(trial.state.is_finished() for trial in study.trials())
        print(f"Interrupted; trials left: {left}. The same command continues them")
        return False
    except OSError as error:
        raise UserError(
            f"the sweep in '{study.folder}' stopped ({reason(error)}): the same command continues it"
        ) from None
    return True


def run_trial(study: Study, trial: Trial, plan: Plan) -> str:
    """Run a trial, and record its result, which is also returned as text."""
    reported = set[int]()

    def watch(pid: int, validations: Validations) -> bool:
        study.beat(trial, pid)
        new = {int(row["step"]): row[METRIC] for row in validations if int(row["step"]) not in reported}
        for step, value in new.items():
            trial.report(value, step)
        reported.update(new)
        return not (new and study.settings["prune"] and trial.should_prune())

    state, value = TrialState.COMPLETE, None
    try:
        if not plan.is_unchanged(trial.params):
            raise UserError("a config file has changed since the sweep began: undo the change, or start a new sweep")
        metrics = run_fit(study.trial_folder(trial), study.fit_args(trial.params), watch)
        if metrics is None:
            state, result = TrialState.PRUNED, f"pruned at step {max(reported, default=0)}"
        else:
            value, result = metrics[METRIC], f"{METRIC} {metrics[METRIC]:.4f}"
            for name in ("seconds", "parameters", "characters"):
                trial.set_user_attr(name, metrics[name])
    except TrialFailed as failed:
        state, result = TrialState.FAIL, f"failed: {failed}"
        trial.set_user_attr("reason", str(failed))
    except UpdateFinishedTrialError:  # this process was suspended for so long that another took the trial
        return "another process has taken it over"
    except BaseException:  # whatever ends this process, the trial is not over
        study.release(trial)
        raise
    study.optuna.tell(trial, value, state, skip_if_finished=True)
    return result


def _count(study: Study, plan: Plan) -> int:
    return max(plan.n_trials or 0, len(study.trials()))


def _progress(study: Study, plan: Plan, trial: Trial, result: str, seconds: float) -> str:
    trials = study.trials()
    ended = [one for one in trials if one.state.is_finished()]
    names = " ".join(f"{name}={brief(value)}" for name, value in trial.params.items())
    line = f"[{len(ended)}/{_count(study, plan)}] {names}: {duration(seconds)}, {result}"
    settings = settings_of(study)
    best = best_of(settings)
    if best.done and len(settings) > 1:
        line += f"; best {best.mean:.4f} with {best.name}"
    if ended and (left := _count(study, plan) - len(ended)):
        usual = statistics.fmean((one.duration or timedelta()).total_seconds() for one in ended)
        line += f"; about {duration(usual * left / (len(study.trials(TrialState.RUNNING)) + 1))} left"
    return line


def duration(seconds: float) -> str:
    """As text: `48 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
