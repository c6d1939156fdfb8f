"""Which setting is better: means, spreads and paired differences over seeds, as a table, CSV files and figures."""

from __future__ import annotations

import csv
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from lmlight import files, pictures
from lmlight.errors import UserError
from lmlight.sweep.study import SEED, Params, Study
from lmlight.sweep.trial import LOG, METRIC, validations

TEXTS = {"val": "the validation text", "tune": "the tuning text, which is the end of the training text"}
MAX_SETTINGS = 12  # in a figure


class Interval(NamedTuple):
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """By Student's t distribution; infinite for a single value."""
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half)


class Setting:
    """Trials that differ in their seed only."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        self.trials, self.params = trials, _without_seed(_params(trials[0]))
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        self.values = {trial.params.get(SEED): trial.values[0] for trial in done}
        self.mean, self.seconds, self.parameters = (
            statistics.fmean(numbers) if numbers else math.inf
            for numbers in (
                list(self.values.values()),
                *([trial.user_attrs[name] for trial in done] for name in ("seconds", "parameters")),
            )
        )

    @property
    def name(self) -> str:
        return ", ".join(f"{name.rpartition('.')[2]}={brief(value)}" for name, value in self.params.items())

    def minus(self, other: Setting) -> Interval | None:
        """The difference to another setting, from the pairs of runs with the same seed."""
        pairs = [value - other.values[seed] for seed, value in self.values.items() if seed in other.values]
        return interval(pairs) if pairs else None


def settings_of(study: Study) -> list[Setting]:
    """All settings, the best first."""
    groups: dict[str, list[FrozenTrial]] = {}
    for trial in study.trials():
        groups.setdefault(repr(_without_seed(_params(trial))), []).append(trial)
    return sorted(map(Setting, groups.values()), key=lambda setting: setting.mean)


def write(study: Study) -> int:
    """Print the report and write its files to the study's folder; returns 1 if no trial has succeeded, else 0."""
    settings, trials = settings_of(study), study.trials()
    if not trials:
        raise UserError(f"the sweep in '{study.folder}' has no trials yet")
    rows = comparison(study, settings)
    print(f"\n{METRIC} at the last validation, on {TEXTS[study.settings['on']]}:\n\n{markdown(rows)}\n")
    for trial in trials:
        if trial.state == TrialState.FAIL:
            what = ", ".join(f"{name}={brief(value)}" for name, value in _params(trial).items())
            log = study.trial_folder(trial) / LOG
            print(f"Failed: {what}: {trial.user_attrs.get('reason', 'it was stopped')} ({log})")
    unfinished = [TrialState.WAITING, TrialState.RUNNING]
    for what, states in {"Pruned": [TrialState.PRUNED], "Not finished": unfinished}.items():
        if count := len(study.trials(*states)):
            print(f"{what}: {count} of {len(trials)} trials")
    commands = {trial.number: shlex.join(["lmlight", "fit", *study.fit_args(_params(trial))]) for trial in trials}
    print(f"To repeat the best run:\n  {commands[settings[0].trials[0].number]}")
    first = [commands[setting.trials[0].number] for setting in settings]
    _write_csv(study.folder / "comparison.csv", [[*row, command] for row, command in zip(rows, ["command", *first])])
    names = list(dict.fromkeys(name for trial in trials for name in _params(trial)))
    header = ["trial", *names, "state", METRIC, "seconds", "parameters", "reason", "folder", "command"]
    _write_csv(
        study.folder / "trials.csv",
        [
            header,
            *(
                [trial.number, *(_params(trial).get(name) for name in names), trial.state.name, trial.value]
                + [trial.user_attrs.get(name) for name in ("seconds", "parameters", "reason")]
                + [study.trial_folder(trial), commands[trial.number]]
                for trial in trials
            ),
        ],
    )
    drawn = [setting for setting in settings if setting.values][:MAX_SETTINGS]
    if drawn:
        points = {setting.name: list(setting.values.values()) for setting in drawn}
        means = {name: interval(values) for name, values in points.items()}
        pictures.strip_plot(points, means).savefig(study.folder / "comparison.png")
        runs = {one.name: [validations(study.trial_folder(trial)) for trial in one.trials] for one in drawn}
        pictures.mean_curves(runs).savefig(study.folder / "curves.png")
    print(f"In {study.folder}: comparison.csv, trials.csv{', comparison.png, curves.png' if drawn else ''}")
    return 0 if drawn else 1


def comparison(study: Study, settings: Sequence[Setting]) -> list[list[str]]:
    """The table of all settings, with its header."""
    baseline = next((one for one in settings if one.params == study.settings["baseline"]), None)
    names = list(settings[0].params)
    several = any(SEED in _params(trial) for trial in settings[0].trials)
    header = [*names, "nats/char", *(["std", "seeds"] if several else []), "training", "parameters"]
    rows = [[*header, "difference to the baseline, 95% interval"] if baseline and len(settings) > 1 else header]
    for setting in settings:
        values = list(setting.values.values())
        spread = [f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–", str(len(values))] if several else []
        state = setting.trials[0].state.name.lower().replace("fail", "failed")
        row = [*map(brief, setting.params.values()), f"{setting.mean:.4f}" if values else state, *spread]
        row += [f"{setting.seconds:.1f} s", f"{setting.parameters:,.0f}"] if values else ["–", "–"]
        rows.append([*row, _difference(setting, baseline)][: len(rows[0])])
    return rows


def _difference(setting: Setting, baseline: Setting | None) -> str:
    if setting is baseline:
        return "baseline"
    found = setting.minus(baseline) if baseline else None
    if found is None:
        return "–"
    if math.isinf(found.high):
        return f"{found.mean:+.4f}, one seed: no interval"
    verdict = ": no difference shown" if found.low <= 0 <= found.high else ""
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}){verdict}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """For people: `48 s`, `12 min`, `3.5 h`."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial, which Optuna does not know before it runs."""
    return trial.params or trial.user_attrs.get("queued", {})


def _without_seed(params: Params) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != SEED}


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with files.whole(path, shared=False) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
