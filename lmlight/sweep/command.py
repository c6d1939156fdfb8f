"""`lmlight sweep`: compares settings over several seeds, or searches for the best, and reports which is better."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from lmlight.command_line import Parser
from lmlight.errors import UserError
from lmlight.sweep.trial import METRIC, TrialFailed, Validations, train

try:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import Trial, TrialState

    from lmlight.sweep import report
    from lmlight.sweep.study import SEED, Params, Study, flags
except ImportError as error:
    raise UserError(f"lmlight sweep needs the package {error.name}: pip install 'lmlight[sweep]'") from None

DESCRIPTION = """Trains each of several settings with the same seeds, or searches for the best setting, and reports which is
better. Options that are not listed here are those of `lmlight fit`. The same command continues an interrupted sweep. In a
second terminal, or on another machine that sees the folder, it takes a share of the trials."""
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
MIN_VALIDATIONS = 5  # of a run that may be pruned


def main(args: Sequence[str]) -> int:
    """Runs `lmlight sweep`. Returns 130 if it was interrupted, 1 if no trial has succeeded, else 0."""
    parser = Parser("lmlight sweep", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--vary", action="append", default=[], metavar="FLAG=A,B", help="values to compare; the first is the baseline")
    add("--seeds", type=int, metavar="N", help="seeds for each setting, from --seed_everything on (default: 3)")
    add("--search", action="append", default=[], metavar="FLAG=RANGE", help="1..6, 0.0..0.3, log:1e-3..3e-2 or A,B,C")
    add("--trials", type=int, metavar="N", help="number of trials of a search (default: 30)")
    add("--prune", action="store_true", help="stop trials of a search that are worse than the median of earlier ones")
    add(
        "--on", choices=("val", "tune"), default="val", help="score on the validation text (default) or the tuning text"
    )
    add("--study", type=Path, metavar="FOLDER", help="folder of the sweep (default: in sweeps/, named by its settings)")
    add("--report", type=Path, metavar="FOLDER", help="only print the report of a sweep")
    options, fit = parser.parse_known_args(args)
    if options.report:
        return report.write(Study(options.report))
    if options.search and (options.vary or options.seeds):
        raise UserError("--search uses one seed: compare the best settings that it finds with --vary and --seeds")
    if not options.search and (options.prune or options.trials):
        raise UserError("--trials and --prune belong to --search: a comparison trains every setting with every seed")
    for name in ("seeds", "trials"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    values = {name: parse_values(name, text) for name, text in _pairs("vary", options.vary)}
    space = {name: parse_range(name, text) for name, text in _pairs("search", options.search)}
    fit += ["--data.validate_on=tune"] if options.on == "tune" else []
    choices = (
        list(_corners(space)) if space else [dict(zip(values, row)) for row in itertools.product(*values.values())]
    )
    checked = [check(fit, params) for params in choices]
    if options.prune:
        steps, interval = (checked[0]["trainer"][name] for name in ("max_steps", "val_check_interval"))
        if isinstance(interval, int) and 0 < steps <= interval:
            fit.append(f"--trainer.val_check_interval={max(1, steps // MIN_VALIDATIONS)}")
            print(f"Pruning needs validations during a run: {fit[-1]}")
    settings = {"fit": fit, "vary": values, "search": sorted(options.search), "prune": options.prune, "on": options.on}
    identity = hashlib.sha256(json.dumps([settings, checked], sort_keys=True).encode()).hexdigest()[:8]
    config = next(
        (Path(word).stem for word in re.split(r"[ =]", " ".join(fit)) if word.endswith((".yaml", ".yml"))), "fit"
    )
    folder = options.study or Path("sweeps") / f"{config}-{identity}"
    study = Study(folder, {**settings, "identity": identity, "baseline": None if space else choices[0]})
    seed = int(checked[0]["seed_everything"])
    seeds = range(seed, seed + (options.seeds or 3))
    study.enqueue([] if space else [{**params, SEED: number} for number in seeds for params in choices])
    grid = {name: CategoricalDistribution(choice) for name, choice in values.items()}
    n_trials = (options.trials or 30) if space else None
    space = space or {**grid, SEED: IntDistribution(0, 2**32 - 1)}
    print(f"Sweep in {folder}: {n_trials or len(study.trials())} trials", flush=True)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        work(study, space, n_trials, seed)
    except KeyboardInterrupt:
        left = len(study.trials(TrialState.WAITING, TrialState.RUNNING))
        print(f"Interrupted with {left} trials to run: the same command continues them")
        return 130
    return report.write(study)


def check(fit: Sequence[str], params: Params) -> dict[str, Any]:
    """The settings of a run with these flags.

    Raises:
        UserError: `lmlight fit` would refuse them.
    """
    from lmlight.training import cli  # takes seconds to import, which help and reports can do without

    for flag in ("--ckpt_path", "--trainer.default_root_dir"):
        if any(re.split("[ =]", word)[0] == flag for word in fit):
            raise UserError(f"{flag} cannot be used in a sweep, which has a folder for each of its runs")
    checked = cli.check_fit([*fit, *flags(params)])
    trainer = checked["trainer"]
    if not trainer["logger"] or "LearningCurve" not in json.dumps(trainer["callbacks"]):
        raise UserError(
            "a sweep needs the callback LearningCurve and a logger: leave out --trainer.callbacks and .logger"
        )
    return checked


def work(study: Study, space: Mapping[str, Distribution], n_trials: int | None, seed: int) -> None:
    """Run trials until none is left, here or in another process."""
    waiting = False
    while (trial := study.claim(space, n_trials, seed)) or study.trials(TrialState.RUNNING):
        if trial is None:
            if not waiting:
                print("Waiting for trials that other processes run", flush=True)
            waiting = True
            time.sleep(1)
            continue
        began = time.monotonic()
        result = run_trial(study, trial)
        names = " ".join(f"{name}={report.brief(value)}" for name, value in trial.params.items())
        trials = study.trials()
        ended = [one for one in trials if one.state.is_finished()]
        lines = report.settings_of(study)
        best = f"; best {lines[0].mean:.4f} with {lines[0].name}" if len(lines) > 1 and lines[0].values else ""
        usual = statistics.fmean((one.duration or timedelta()).total_seconds() for one in ended)
        left = (n_trials or len(trials)) - len(ended)
        workers = max(1, len(study.trials(TrialState.RUNNING)) + 1)
        time_left = f"; {report.duration(usual * left / workers)} left" if left else ""
        print(
            f"[{len(ended)}/{n_trials or len(trials)}] {names}: {report.duration(time.monotonic() - began)}, {result}"
            f"{best}{time_left}",
            flush=True,
        )


def run_trial(study: Study, trial: Trial) -> str:
    """Run a trial, and tell the study its result, which is also returned, for people."""
    reported = set[int]()

    def watch(pid: int, validations: Validations) -> bool:
        study.beat(trial, pid)
        new = {int(row["step"]): row[METRIC] for row in validations if int(row["step"]) not in reported}
        for step, value in new.items():
            trial.report(value, step)
        reported.update(new)
        return not (new and study.settings["prune"] and trial.should_prune())

    try:
        result = train(study.trial_folder(trial), study.fit_args(trial.params), watch)
    except TrialFailed as failed:
        trial.set_user_attr("reason", str(failed))
        study.optuna.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return f"failed: {failed}"
    except KeyboardInterrupt:
        study.release(trial)
        raise
    if result is None:
        study.optuna.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        return f"pruned at step {max(reported)}"
    for name, value in result.items():
        trial.set_user_attr(name, value)
    study.optuna.tell(trial, result[METRIC], skip_if_finished=True)
    return f"{METRIC} {result[METRIC]:.4f}"


def parse_values(name: str, text: str) -> list[Any]:
    """The values of `--vary NAME=TEXT`, separated by commas; lists and mappings are JSON.

    Raises:
        UserError: There is no value, or one twice.
    """
    with suppress(yaml.YAMLError):
        values = [
            one if isinstance(one, (str, int, float)) or one is None else json.dumps(one)
            for one in yaml.safe_load(f"[{text}]")
        ]
        if values and len(set(map(repr, values))) == len(values):
            return values
    raise UserError(f"--vary {name}={text}: expected different values separated by commas, such as {name}=1,2,3")


def parse_range(name: str, text: str) -> Distribution:
    """The distribution of `--search NAME=TEXT`.

    Raises:
        UserError: It is no range, and no list of values.
    """
    log, limits = text.startswith("log:"), text.removeprefix("log:").split("..")
    if len(limits) != 2:
        return CategoricalDistribution(parse_values(name, text))
    try:
        if all(re.fullmatch(r"-?\d+", limit) for limit in limits):
            return IntDistribution(int(limits[0]), int(limits[1]), log=log)
        return FloatDistribution(float(limits[0]), float(limits[1]), log=log)
    except ValueError as error:
        raise UserError(f"--search {name}={text}: {error}; expected a range such as 1..6 or log:1e-3..3e-2") from None


def _pairs(flag: str, given: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen = set[str]()
    for text in given:
        name, equals, value = text.removeprefix("--").partition("=")
        if not equals or not name or name in seen:
            raise UserError(f"--{flag} {text}: expected each flag once, as in --{flag} model.optimizer.lr=...")
        seen.add(name)
        yield name, value


def _corners(space: Mapping[str, Distribution]) -> Iterator[dict[str, Any]]:
    """Few choices that together have the lowest and the highest value, or each of the values, of every parameter."""
    ends = [one.choices if isinstance(one, CategoricalDistribution) else (one.low, one.high) for one in space.values()]
    for number in range(max(map(len, ends))):
        yield {name: end[number % len(end)] for name, end in zip(space, ends)}
