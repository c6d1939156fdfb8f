"""`lmlight sweep`: compares settings over several seeds, or searches for the best, and reports the results."""

import hashlib
import itertools
import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lmlight.command_line import Parser
from lmlight.errors import UserError, missing_extra

try:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from lmlight.sweep import report, worker
    from lmlight.sweep.study import SEED, Params, Plan, Study, flags
except ImportError as error:
    raise missing_extra(f"lmlight sweep needs the {error.name} package", "sweep") from None

DESCRIPTION = """Trains a model with each of several settings and the same seeds, or searches for the best setting, and
reports which is best. Options that are not listed here are those of `lmlight fit`. The same command continues an
interrupted sweep. Run it in a second terminal, or on another machine that shares the folder, to share the trials."""
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
MAX_SEED = 2**32 - 1
MIN_VALIDATIONS = 5  # per run, if --prune finds only one
FOLDERS = ("ckpt_path", "trainer.default_root_dir")  # flags that the sweep sets itself


def main(args: Sequence[str]) -> int:
    """Runs `lmlight sweep`. Returns 130 if it was interrupted, 1 if no trial has succeeded, else 0."""
    parser = Parser("lmlight sweep", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--vary", action="append", default=[], metavar="FLAG=A,B", help="values to compare; the first is the baseline")
    add(
        "--seeds",
        type=int,
        metavar="N",
        help="number of seeds for each setting, starting at --seed_everything (default: 3)",
    )
    add(
        "--search",
        action="append",
        default=[],
        metavar="FLAG=RANGE",
        help="a range of integers (1..6) or floats (0.0..0.3), also on a log scale (log:1e-3..3e-2), or choices (A,B,C)",
    )
    add("--trials", type=int, metavar="N", help="number of trials of a search (default: 30)")
    add(
        "--prune",
        action="store_true",
        help="stop trials whose best loss so far is above the median of earlier trials at the same step",
    )
    add(
        "--on",
        choices=("val", "tune"),
        help="text to score: validation (default), or tune, the end of the training text",
    )
    add(
        "--study",
        type=Path,
        metavar="FOLDER",
        help="folder of the sweep (default: sweeps/NAME, named after the config file and a hash of the settings)",
    )
    add("--retry", action="store_true", help="run failed trials again")
    add("--report", type=Path, metavar="FOLDER", help="write the report of an existing sweep, without running trials")
    options, fit = parser.parse_known_args(args)
    if options.report:
        return report.write(Study(options.report))
    if options.search and (options.vary or options.seeds):
        raise UserError("--search uses one seed: use --vary and --seeds afterwards, to compare the best settings")
    if not options.search and (options.prune or options.trials):
        raise UserError("--trials and --prune belong to --search: a comparison runs every setting with every seed")
    for name in ("seeds", "trials"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    values = {name: parse_values(name, text) for name, text in _pairs("vary", options.vary)}
    space = {name: parse_range(name, text) for name, text in _pairs("search", options.search)}
    fit += [f"--data.validate_on={options.on}"] if options.on else []
    grid = [dict(zip(values, row)) for row in itertools.product(*values.values())]
    settings = list(_corners(space)) if space else grid
    if len(settings) > 1:
        print(f"Checking {len(settings)} settings", flush=True)
    checked = [check(fit, params) for params in settings]
    for one, other in itertools.combinations(range(len(grid)), 2):
        if not space and checked[one] == checked[other]:
            raise UserError(f"{' '.join(flags(grid[one]))} and {' '.join(flags(grid[other]))} give the same settings")
    trainer, seed = checked[0]["trainer"], int(checked[0][SEED])
    seeds = range(seed, seed + (options.seeds or 3))
    if seeds[-1] > MAX_SEED:
        raise UserError(
            f"the last seed would be {seeds[-1]}: choose --seed_everything at least {len(seeds)} below 2**32"
        )
    steps, interval, accumulate = (trainer[k] for k in ("max_steps", "val_check_interval", "accumulate_grad_batches"))
    if options.prune and isinstance(interval, int) and 0 < steps * accumulate <= interval:  # one validation
        if steps % MIN_VALIDATIONS:
            raise UserError(
                f"--prune needs several validations in a run of {steps} steps: pass --trainer.val_check_interval"
            )
        fit.append(f"--trainer.val_check_interval={steps // MIN_VALIDATIONS * accumulate}")
        print(f"Pruning needs several validations in each run: added {fit[-1]}")
        checked = [check(fit, params) for params in settings]
    described = {"fit": fit, "vary": values, "search": sorted(options.search), "prune": options.prune}
    identity = hashlib.sha256(json.dumps([described, checked], sort_keys=True).encode()).hexdigest()[:8]
    configs = re.findall(r"(?:^| )(?:--config|-c)[= ](\S+)", " ".join(fit))
    folder = options.study or Path("sweeps") / f"{Path(configs[0]).stem if configs else 'fit'}-{identity}"
    on = checked[0]["data"].get("validate_on", "val")
    study = Study(folder, {**described, "on": on, "identity": identity, "baseline": None if space else grid[0]})
    study.enqueue([] if space else [{**params, SEED: number} for number in seeds for params in grid], options.retry)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def is_unchanged(params: Params) -> bool:
        """Whether the config files are unchanged since the start. For a search, compares its first settings."""
        at = 0 if space else grid.index({name: params[name] for name in values})
        return check(fit, settings[at]) == checked[at]

    choices = {name: CategoricalDistribution(several) for name, several in values.items()}
    plan = Plan(
        space=dict(space or {**choices, SEED: IntDistribution(0, MAX_SEED)}),
        n_trials=(options.trials or 30) if space else None,
        seed=seed,
        is_unchanged=is_unchanged,
    )
    return report.write(study) if worker.work(study, plan) else 130


def check(fit: Sequence[str], params: Params) -> dict[str, Any]:
    """All settings of a run with these flags.

    Raises:
        UserError: `lmlight fit` would refuse them, or they do not work in a sweep.
    """
    from lmlight.training import cli  # takes seconds to import, which help and reports can do without

    for flag in FOLDERS:
        if any(re.split("[ =]", word)[0] == f"--{flag}" for word in fit):
            raise UserError(f"--{flag} cannot be used in a sweep, which sets it for each of its runs")
    try:
        # not `runs`: this check would find `best` in there, but a trial would not
        checked = cli.check_fit([*fit, *flags(params), "--trainer.default_root_dir=sweeps"])
    except UserError as error:
        where = f" (with {' '.join(flags(params))})" if params else ""
        raise UserError(f"{str(error).partition('; see `')[0]}{where}") from None
    trainer = checked["trainer"]
    if trainer["barebones"] or not trainer["logger"] or "LearningCurve" not in json.dumps(trainer["callbacks"]):
        raise UserError(
            "a sweep needs LearningCurve and a logger: leave out --trainer.callbacks, --trainer.logger and "
            "--trainer.barebones"
        )
    if trainer["max_time"]:
        raise UserError("trainer.max_time cannot be used in a sweep: it would start over when a trial is resumed")
    steps, interval = trainer["max_steps"] * trainer["accumulate_grad_batches"], trainer["val_check_interval"]
    if isinstance(interval, int) and steps > 0 and steps % interval:
        raise UserError(
            f"trainer.max_steps {trainer['max_steps']} is not a multiple of trainer.val_check_interval {interval}, so the "
            "final model would not be scored: change one of them"
        )
    return checked


def parse_values(name: str, text: str, flag: str = "vary") -> list[str]:
    """The values of `--vary NAME=TEXT`, as strings. A comma inside brackets or quotes does not separate."""
    try:
        nodes = yaml.compose(f"[{text}]").value
    except (yaml.YAMLError, AttributeError):
        raise UserError(
            f"--{flag} {name}={text} is not a list of values: put quotes around those with special characters, as in "
            f"""--{flag} '{name}="*.txt",b.txt'"""
        ) from None
    raw = [
        node.value if getattr(node, "style", None) else text[node.start_mark.index - 1 : node.end_mark.index - 1]
        for node in nodes
    ]
    if not raw or len({*raw}) < len(raw) or text.rstrip().endswith(","):
        raise UserError(f"--{flag} {name}={text}: expected different values separated by commas, such as {name}=1,2,3")
    return raw


def parse_range(name: str, text: str) -> Distribution:
    """The distribution of `--search NAME=TEXT`."""
    is_log, limits = text.startswith("log:"), text.removeprefix("log:").split("..")
    if len(limits) != 2 or "," in text:
        return CategoricalDistribution(parse_values(name, text, "search"))
    try:
        if all(re.fullmatch(r"-?\d+", limit) for limit in limits):
            return IntDistribution(int(limits[0]), int(limits[1]), log=is_log)
        return FloatDistribution(float(limits[0]), float(limits[1]), log=is_log)
    except ValueError as error:
        raise UserError(f"--search {name}={text}: {error}; expected a range such as 1..6 or log:1e-3..3e-2") from None


def _pairs(flag: str, given: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen = set[str]()
    for text in given:
        name, equals, value = text.removeprefix("--").partition("=")
        if not equals or not name or name in seen:
            raise UserError(
                f"--{flag} {text}: expected FLAG=..., each flag once, as in --{flag} model.optimizer.lr=..."
            )
        if name in (*FOLDERS, SEED, "data.validate_on"):
            raise UserError(f"--{flag} {text}: the sweep itself sets {name}; see --seeds, --on and --study")
        seen.add(name)
        yield name, value


def _corners(space: Mapping[str, Distribution]) -> Iterator[dict[str, Any]]:
    """A few settings that cover the ends of every range, and every choice."""
    ends = [one.choices if isinstance(one, CategoricalDistribution) else (one.low, one.high) for one in space.values()]
    for number in range(max(map(len, ends))):
        yield {name: end[number % len(end)] for name, end in zip(space, ends)}
