"""What does it cost to watch a run learn? The default recipe with all callbacks of `lmlight fit`, and with none.

    python benchmarks/looking.py [--steps 1000] [--rounds 3]

Whole runs take turns, validations included on both sides, everything that is drawn at the end too. On a machine that others
use too, the difference between two runs says little; so the time inside the callbacks and the logger is added up as well, as
a share of the run in which it is spent. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import SimpleProfiler

from lmlight import LanguageModel, TextDataModule
from lmlight.training import callbacks
from lmlight.training.callbacks import RunLogger
from lmlight.training.cli import TRAINER_DEFAULTS


class TimedLogger(RunLogger):
    """Adds up the seconds that logging takes."""

    seconds = 0.0

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        super().log_metrics(*arguments, **options)
        self.seconds += time.perf_counter() - began


def fit(steps: int, watching: list[pl.Callback]) -> tuple[float, dict[str, float]]:
    """The seconds of a run from beginning to end, and of each callback and the logger."""
    elsewhere = ("logger", "max_steps", "default_root_dir")
    defaults: dict[str, Any] = {k: v for k, v in TRAINER_DEFAULTS.items() if k not in elsewhere}
    with tempfile.TemporaryDirectory() as folder:
        logger, profiler = TimedLogger(folder), SimpleProfiler()
        trainer = pl.Trainer(
            **defaults,
            max_steps=steps,
            accelerator="cpu",
            logger=logger,
            callbacks=watching,
            profiler=profiler,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        began = time.perf_counter()
        trainer.fit(LanguageModel(), datamodule=TextDataModule())
        seconds = time.perf_counter() - began
    spent = {"logger": logger.seconds}
    for action, times in profiler.recorded_durations.items():
        for callback in watching:
            name = type(callback).__name__
            if action.startswith(f"[Callback]{name}."):
                spent[name] = spent.get(name, 0.0) + sum(times)
    return seconds, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the profiler's own tables

    def everything() -> list[pl.Callback]:
        return [pl.callbacks.LearningRateMonitor(), *(kind() for kind in callbacks.DEFAULT)]

    fit(20, everything())  # imports, the corpus and the tokenizer
    bare, watched = [], []
    for _ in range(options.rounds):
        bare.append(fit(options.steps, []))
        watched.append(fit(options.steps, everything()))
    print(f"| {options.steps} steps of the default, watched by | seconds, each run | median |\n|---|---|---|")
    for name, runs in (("nothing", bare), ("all of it", watched)):
        each, median = ", ".join(f"{seconds:.1f}" for seconds, _ in runs), statistics.median(s for s, _ in runs)
        print(f"| {name} | {each} | {median:.1f} |")
    print("\n| of the run's time, median | |\n|---|---|")
    shares = {name: [spent[name] / seconds for seconds, spent in watched] for name in watched[0][1]}
    without = statistics.median(spent["logger"] / seconds for seconds, spent in bare)
    shares["logger"] = [share - without for share in shares["logger"]]
    medians = {name: statistics.median(values) for name, values in shares.items()}
    for name, share in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"| {name}{', beyond what it takes without' if name == 'logger' else ''} | {share:.2%} |")
    print(f"| together | {sum(medians.values()):.2%} |")


if __name__ == "__main__":
    main()
