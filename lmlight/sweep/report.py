"""Which setting is better: means, spreads and paired differences over seeds, as a table, CSV files and figures."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from lmlight import files, pictures
from lmlight.command_line import join, program
from lmlight.errors import UserError, reason, say
from lmlight.sweep.study import SEED, Params, Study, flags
from lmlight.sweep.trial import LOG, METRIC, validations

TEXTS = {"val": "the validation text", "tune": "the tuning text, which is the end of the training text"}
MAX_SETTINGS = 12  # in the figures


class Interval(NamedTuple):
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95% interval, by Student's t distribution; infinitely wide for a single value."""
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half)


class Setting:
    """Trials that differ in their seed only."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        self.trials, self.params = trials, _without_seed(_params(trials[0]))
        self.done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        self.values = {trial.params.get(SEED): trial.values[0] for trial in self.done}
        self.characters = self.done[0].user_attrs.get("characters") if self.done else None
        self.mean = statistics.fmean(self.values.values()) if self.done else math.inf

    @property
    def name(self) -> str:
        return ", ".join(f"{name.rpartition('.')[2]}={brief(value)}" for name, value in self.params.items())

    def minus(self, other: Setting) -> Interval | None:
        """The difference from another setting, from the pairs of runs with the same seed."""
        pairs = [value - other.values[seed] for seed, value in self.values.items() if seed in other.values]
        return interval(pairs) if pairs else None


def settings_of(study: Study) -> list[Setting]:
    """All settings, the best first."""
    groups: dict[str, list[FrozenTrial]] = {}
    for trial in study.trials():
        groups.setdefault(repr(_without_seed(_params(trial))), []).append(trial)
    return sorted(map(Setting, groups.values()), key=lambda setting: setting.mean)


def best_of(settings: Sequence[Setting]) -> Setting:
    """The best of those with the most finished runs: means of fewer seeds vary more, and some seeds may have diverged."""
    return max(settings, key=lambda setting: len(setting.values))  # in a tie, the first, which is the best


def write(study: Study) -> int:
    """Print the report and write its files to the study's folder; returns 1 if no trial has succeeded, else 0."""
    settings, trials = settings_of(study), study.trials()
    if not trials:
        raise UserError(f"the sweep in '{study.folder}' has no trials yet")
    rows = comparison(study, settings)
    print(f"\n{METRIC} at the last validation, on {TEXTS[study.settings['on']]}:\n\n{markdown(rows)}\n")
    if len({setting.characters for setting in settings if setting.done}) > 1:
        print(
            "The settings are scored on different texts (see the characters in trials.csv): their losses are not comparable"
        )
    for trial in study.trials(TrialState.FAIL):
        log = study.trial_folder(trial) / LOG
        print(f"Failed: {' '.join(flags(_params(trial)))}: {trial.user_attrs.get('reason', 'stopped')} ({log})")
    unfinished = [TrialState.WAITING, TrialState.RUNNING]
    for what, states in {"Pruned": [TrialState.PRUNED], "Not finished": unfinished}.items():
        if count := len(study.trials(*states)):
            print(f"{what}: {count} of {len(trials)} trials")
    arguments = {trial.number: join(["fit", *study.fit_args(_params(trial))]) for trial in trials}
    if done := best_of(settings).done:
        print(f"To repeat a run of the best setting:\n  {program()} {arguments[done[0].number]}")
    try:
        with study.locked():
            _write_files(study, settings, rows, {number: f"lmlight {words}" for number, words in arguments.items()})
    except OSError as error:
        say(UserError(f"the report's files cannot be written to '{study.folder}' ({reason(error)})"), "warning")
    return 0 if done else 1


def _write_files(study: Study, settings: list[Setting], rows: list[list[str]], commands: dict[int, str]) -> None:
    first = [commands[setting.trials[0].number] for setting in settings]
    table = [[*row, command] for row, command in zip(rows, ["command", *first])]
    names = list(dict.fromkeys(name for trial in study.trials() for name in _params(trial)))
    metrics = ("characters", "seconds", "parameters", "reason")
    runs: list[list[Any]] = [["trial", *names, "state", METRIC, *metrics, "folder", "command"]]
    for trial in study.trials():
        values = [trial.number, *(_params(trial).get(name) for name in names), trial.state.name, trial.value]
        values += [trial.user_attrs.get(name) for name in metrics]
        runs.append([*values, study.trial_folder(trial), commands[trial.number]])
    for name, lines in {"comparison.csv": table, "trials.csv": runs}.items():
        with files.whole(study.folder / name) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)
    done = [setting for setting in settings if setting.done]
    # the best, and the baseline in any case
    drawn = [one for at, one in enumerate(done) if at < MAX_SETTINGS or one.params == study.settings["baseline"]]
    figures = {}
    if drawn:
        points = [(one.name, list(one.values.values()), interval(list(one.values.values()))) for one in drawn]
        curves = [(one.name, [validations(study.trial_folder(trial)) for trial in one.done]) for one in drawn]
        figures = {"comparison.png": pictures.strip_plot(points), "curves.png": pictures.mean_curves(curves)}
    for name, figure in figures.items():
        with files.whole(study.folder / name) as beside:
            figure.savefig(beside, format="png")
    some = f" (figures: {len(drawn)} of {len(settings)} settings)" if len(drawn) < len(settings) and drawn else ""
    print(f"In {study.folder}: {', '.join(['comparison.csv', 'trials.csv', *figures])}{some}")


def comparison(study: Study, settings: Sequence[Setting]) -> list[list[str]]:
    """The table of all settings, with its header."""
    baseline = next((one for one in settings if one.params == study.settings["baseline"]), None)
    names = list(settings[0].params)
    several = study.settings["baseline"] is not None  # seeds, not a search
    header = [*names, "nats/char", *(["std", "seeds"] if several else []), "training", "parameters"]
    rows = [[*header, "difference from the baseline, 95% interval"] if baseline and len(settings) > 1 else header]
    for setting in settings:
        values, done = list(setting.values.values()), setting.done
        count = str(len(values)) if len(values) == len(setting.trials) else f"{len(values)} of {len(setting.trials)}"
        spread = [f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–", count] if several else []
        state = setting.trials[0].state.name.lower().replace("fail", "failed")
        seconds = statistics.fmean(trial.user_attrs["seconds"] for trial in done) if done else math.nan
        parameters = done[0].user_attrs["parameters"] if done else None
        row = [*map(brief, setting.params.values()), f"{setting.mean:.4f}" if done else state, *spread]
        row += [f"{seconds:.1f} s" if done else "–", f"{parameters:,}" if parameters else "–"]
        rows.append([*row, _difference(setting, baseline)][: len(rows[0])])
    return rows


def _difference(setting: Setting, baseline: Setting | None) -> str:
    if setting is baseline:
        return "baseline"
    found = setting.minus(baseline) if baseline else None
    if found is None or baseline is None:
        return "–"
    if setting.characters != baseline.characters:
        return "scored on a different text"
    if math.isinf(found.high):
        return f"{found.mean:+.4f}, one seed: no interval"
    pairs = len(setting.values.keys() & baseline.values.keys())
    text = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
    if pairs < max(len(setting.values), len(baseline.values)):
        text += f", {pairs} pairs"
    return f"{text}: no significant difference" if found.low <= 0 <= found.high else text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial; Optuna does not know those of a queued one."""
    return trial.params or trial.user_attrs.get("queued", {})


def _without_seed(params: Params) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != SEED}
