"""How fast is a training step, against a bare loop around the same net, and against nanoGPT's own loop?

    python benchmarks/throughput.py [--rounds 8] [--steps 40] [--json FILE]

Two comparisons, each with the same shape, batch and data type, in alternating rounds of one process; medians, and ratios
of medians. The first step of each round is left out. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nanogpt
import numpy as np
import torch
import torch.nn.functional as F

import lmlight  # first: it bounds how long torch's threads spin
from lmlight import LanguageModel, TextDataModule, Transformer
from lmlight.callbacks import RunLogger, RunProgress, SampleText
from lmlight.cli import TRAINER_DEFAULTS
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.optim import parameter_groups
from lmlight.reliability import KeepCheckpoints

# a round: given a number of steps, the seconds that each of them took
Round = Callable[[int], list[float]]


class StepTimes(pl.Callback):
    """When each step begins."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began.append(time.perf_counter())


def lmlight_loop(data: TextDataModule, **net: Any) -> Round:
    """`lmlight fit` as it is by default, with its callbacks and logs; validation aside."""
    defaults = {k: v for k, v in TRAINER_DEFAULTS.items() if k not in ("logger", "max_steps", "default_root_dir")}

    def run(steps: int) -> list[float]:
        times = StepTimes()
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [
                times,
                SampleText(),
                RunProgress(),
                pl.callbacks.LearningRateMonitor("step"),
                KeepCheckpoints(),
            ]
            callbacks[2].disable()
            trainer = pl.Trainer(
                **defaults,
                max_steps=steps + 1,
                limit_val_batches=0,
                accelerator="cpu",
                logger=RunLogger(folder),
                callbacks=callbacks,
            )
            trainer.fit(LanguageModel(net=lambda v, b: Transformer(v, b, **net)), datamodule=data)
        return list(np.diff(times.began))

    return run


def bare_loop(data: TextDataModule, **net: Any) -> Round:
    """The same net, batches, optimizer and clipping in the shortest loop that does the work."""
    assert data.tokenizer is not None
    model = Transformer(data.tokenizer.vocab_size, data.block_size, **net)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=2e-3, weight_decay=0.1, fused=True)

    def run(steps: int) -> list[float]:
        torch.set_float32_matmul_precision("medium")
        began = []
        batches = iter(data.train_dataloader())
        for _ in range(steps + 1):
            began.append(time.perf_counter())
            batch = next(batches)
            loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.set_float32_matmul_precision("highest")
        return list(np.diff(began))

    return run


def nanogpt_loop(ids: np.ndarray, vocab_size: int) -> Round:
    """The inner loop of nanoGPT's train.py, with its own model, optimizer and batches."""
    recipe, module = nanogpt.CPU_RECIPE, nanogpt.model()
    sizes = {name: recipe[name] for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    model = module.GPT(module.GPTConfig(vocab_size=vocab_size, bias=False, **sizes))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    block_size, batch_size = recipe["block_size"], recipe["batch_size"]

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        ix = torch.randint(len(ids) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy((ids[i : i + block_size]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((ids[i + 1 : i + 1 + block_size]).astype(np.int64)) for i in ix])
        return x, y

    def run(steps: int) -> list[float]:
        began = []
        x, y = get_batch()
        for _ in range(steps + 1):
            began.append(time.perf_counter())
            _, loss = model(x, y)
            x, y = get_batch()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return list(np.diff(began))

    return run


def matrix_rate(precision: str) -> float:
    """GFLOP/s of a float32 product of 2048 × 2048 matrices, the best of ten."""
    torch.set_float32_matmul_precision(precision)
    a, best = torch.randn(2048, 2048), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    torch.set_float32_matmul_precision("highest")
    return 2 * 2048**3 / best / 1e9


def compare(rounds: int, steps: int, loops: dict[str, Round]) -> dict[str, float]:
    """Median seconds of a step in each loop."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name] += loop(steps)[1:]
    return {name: statistics.median(values) for name, values in times.items()}


def prepared(**settings: Any) -> TextDataModule:
    data = TextDataModule(**settings)
    data.prepare_data()
    data.setup("fit")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    rates = {precision: matrix_rate(precision) for precision in ("highest", "medium")}
    versions = f"torch {torch.__version__}, lmlight {lmlight.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    print(f"matrix products: {rates['highest']:.0f} GFLOP/s at precision highest, {rates['medium']:.0f} at medium\n")

    default = prepared()
    ours = compare(
        options.rounds, options.steps, {"lmlight fit": lmlight_loop(default), "bare loop": bare_loop(default)}
    )
    assert default.tokenizer is not None
    flops = 3 * Transformer(default.tokenizer.vocab_size, 64).flops_per_token()
    tokens = default.batch_size * default.block_size
    print("| the default's shape | ms a step | tokens/s | of the matrix rate |\n|---|---|---|---|")
    for name, seconds in ours.items():
        share = flops * tokens / seconds / 1e9 / rates["medium"]
        print(f"| {name} | {1e3 * seconds:.1f} | {tokens / seconds:,.0f} | {share:.0%} |")
    print(f"\nLightning's loop and the callbacks add {ours['lmlight fit'] / ours['bare loop'] - 1:.1%}.\n")

    characters = prepared(tokenizer=TokenizerConfig("char"), batch_size=12)
    shape = dict(norm="layernorm", positions="learned", mlp="gelu", tie=True)
    loops = {
        "lmlight fit": lmlight_loop(characters, **shape),
        "nanoGPT": nanogpt_loop(characters._train_ids, 65),
    }
    theirs = compare(options.rounds, options.steps, loops)
    print("| nanoGPT's CPU recipe, its shape | ms a step | tokens/s |\n|---|---|---|")
    for name, seconds in theirs.items():
        print(f"| {name} | {1e3 * seconds:.1f} | {12 * 64 / seconds:,.0f} |")
    print(f"\nlmlight's throughput is {theirs['nanoGPT'] / theirs['lmlight fit']:.2f} of nanoGPT's.")
    if options.json:
        figures = {"matrix_gflops": rates, "default": ours, "nanogpt_shape": theirs}
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
