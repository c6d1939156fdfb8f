"""The cost of the default callbacks: the default recipe with and without all callbacks of `lmlight fit`.

    python benchmarks/callbacks.py [--steps 1000] [--rounds 3]

Complete runs alternate; all of them validate. Differences between runs are noisy on a shared machine, so the script also
reports the time inside callbacks and logger as a share of the run. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

from lmlight.__main__ import set_up_process

set_up_process("fit")  # before torch is imported

import lightning.pytorch as pl
from lightning.pytorch.profilers import SimpleProfiler

from lmlight import LanguageModel, TextDataModule
from lmlight.training import callbacks
from lmlight.training.cli import TRAINER_DEFAULTS


class TimedLogger(callbacks.RunLogger):
    """Sums the seconds spent in logging."""

    seconds = 0.0

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        super().log_metrics(*arguments, **options)
        self.seconds += time.perf_counter() - began


def fit(steps: int, watching: list[pl.Callback]) -> tuple[float, dict[str, float]]:
    """Returns the seconds of a run, and the seconds in each callback and the logger."""
    given = ("logger", "max_steps", "default_root_dir")
    defaults: dict[str, Any] = {k: v for k, v in TRAINER_DEFAULTS.items() if k not in given}
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
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hides the profiler's tables

    def defaults() -> list[pl.Callback]:
        return [pl.callbacks.LearningRateMonitor(), *(kind() for kind in callbacks.DEFAULT)]

    fit(20, defaults())  # warms up imports, corpus and tokenizer
    without, watched = [], []
    for _ in range(options.rounds):
        without.append(fit(options.steps, []))
        watched.append(fit(options.steps, defaults()))
    print(f"| {options.steps} steps of the default run, callbacks | seconds of each run | median |\n|---|---|---|")
    for name, runs in (("none", without), ("all", watched)):
        each, median = ", ".join(f"{seconds:.1f}" for seconds, _ in runs), statistics.median(s for s, _ in runs)
        print(f"| {name} | {each} | {median:.1f} |")
    print("\n| share of the run time, median | |\n|---|---|")
    shares = {name: [spent[name] / seconds for seconds, spent in watched] for name in watched[0][1]}
    baseline = statistics.median(spent["logger"] / seconds for seconds, spent in without)
    shares["logger"] = [share - baseline for share in shares["logger"]]
    medians = {name: statistics.median(values) for name, values in shares.items()}
    for name, share in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"| {name}{', more than without callbacks' if name == 'logger' else ''} | {share:.2%} |")
    print(f"| total | {sum(medians.values()):.2%} |")


if __name__ == "__main__":
    main()
