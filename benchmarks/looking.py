"""What does it cost to watch a run learn? The default recipe with all callbacks of `lmlight fit`, and with none.

    python benchmarks/looking.py [--steps 1000] [--rounds 3]

Whole runs take turns, validations included on both sides, everything that is drawn at the end too. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl

from lmlight import LanguageModel, TextDataModule, callbacks
from lmlight.callbacks import RunLogger
from lmlight.cli import TRAINER_DEFAULTS


def seconds_of_fit(steps: int, watching: list[pl.Callback]) -> float:
    """From the first step to the end, with the same data, seed and validations."""
    defaults: dict[str, Any] = {
        k: v for k, v in TRAINER_DEFAULTS.items() if k not in ("logger", "max_steps", "default_root_dir")
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **defaults,
            max_steps=steps,
            accelerator="cpu",
            logger=RunLogger(folder),
            callbacks=watching,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        began = time.perf_counter()
        trainer.fit(LanguageModel(), datamodule=TextDataModule())
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ways = {
        "nothing": lambda: [],
        "all of it": lambda: [pl.callbacks.LearningRateMonitor(), *(kind() for kind in callbacks.DEFAULT)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    seconds_of_fit(20, ways["all of it"]())  # imports, the corpus and the tokenizer
    for _ in range(options.rounds):
        for name, make in ways.items():
            seconds[name].append(seconds_of_fit(options.steps, make()))
    print(
        f"| {options.steps} steps of the default, watched by | seconds, each run | median | of nothing |\n|---|---|---|---|"
    )
    least = statistics.median(seconds["nothing"])
    for name, values in seconds.items():
        each, median = ", ".join(f"{value:.1f}" for value in values), statistics.median(values)
        print(f"| {name} | {each} | {median:.1f} | {median / least:.3f} |", flush=True)


if __name__ == "__main__":
    main()
