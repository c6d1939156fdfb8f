"""Time of a training step, compared with a bare loop, nanoGPT's loop, and networks of other projects.

    python benchmarks/throughput.py [--rounds 8] [--steps 20] [--json FILE]

Each table compares loops with the same shape, batch and data type, which take turns in one process. Results are medians and
their ratios. The first step of each round is excluded. Peak memory is the memory that ten steps in a separate
process add after the network is built. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lmlight.__main__ import set_up_process

set_up_process("fit")  # before torch is imported

import lightning.pytorch as pl
import numpy as np
import peers
import torch
import torch.nn.functional as F
from peers import NANOGPT_CPU, Shape
from torch import Tensor

import lmlight
from lmlight import LanguageModel, TextDataModule, Transformer
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.models import GPT2, LLAMA
from lmlight.optim import Muon, parameter_groups
from lmlight.training import callbacks
from lmlight.training.callbacks import RunLogger, RunProgress
from lmlight.training.checkpointing import BestLastCheckpoint
from lmlight.training.cli import TRAINER_DEFAULTS

# Runs a number of steps and returns the seconds of each.
Round = Callable[[int], list[float]]
SMALL = Shape(65, *(NANOGPT_CPU[name] for name in ("block_size", "n_layer", "n_head", "n_embd")))
LARGER = Shape(4096, 256, 6, 6, 384)


class StepTimes(pl.Callback):
    """Records the start time of each step."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began.append(time.perf_counter())


def lmlight_fit(data: TextDataModule, model: Callable[[], LanguageModel] = LanguageModel) -> Round:
    """The default `lmlight fit` with callbacks and logging, but without validation."""
    defaults = {k: v for k, v in TRAINER_DEFAULTS.items() if k not in ("logger", "max_steps", "default_root_dir")}

    def run(steps: int) -> list[float]:
        times, progress = StepTimes(), RunProgress()
        with tempfile.TemporaryDirectory() as folder:
            watching = [pl.callbacks.LearningRateMonitor(), *(kind() for kind in callbacks.DEFAULT)]
            trainer = pl.Trainer(
                **defaults,
                max_steps=steps + 1,
                limit_val_batches=0,
                accelerator="cpu",
                logger=RunLogger(folder),
                enable_progress_bar=False,
                callbacks=[times, *watching, progress, BestLastCheckpoint()],
            )
            trainer.fit(model(), datamodule=data)
        return list(np.diff(times.began))

    return run


def bare_loop(data: TextDataModule) -> Round:
    """The default network, batches, optimizer and clipping in a minimal loop."""
    assert data.tokenizer is not None
    model = Transformer(data.tokenizer.vocab_size, data.block_size)
    optimizer = Muon(parameter_groups(model))

    def run(steps: int) -> list[float]:
        began = []
        batches = iter(data.train_dataloader())
        with medium_precision():
            for _ in range(steps + 1):
                began.append(time.perf_counter())
                batch = next(batches)
                loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
                descend(loss, model, optimizer)
        return list(np.diff(began))

    return run


def nanogpt_loop(precision: str) -> Round:
    """The inner loop of nanoGPT's train.py with its model, optimizer and batches."""
    model, loss_of = peers.nanogpt(SMALL)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    block_size, batch_size = SMALL.block_size, NANOGPT_CPU["batch_size"]
    ids = np.random.default_rng(0).integers(SMALL.vocab_size, size=1_000_000).astype(np.uint16)

    def get_batch() -> tuple[Tensor, Tensor]:
        ix = torch.randint(len(ids) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy((ids[i : i + block_size]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((ids[i + 1 : i + 1 + block_size]).astype(np.int64)) for i in ix])
        return x, y

    def run(steps: int) -> list[float]:
        began = []
        x, y = get_batch()
        with medium_precision() if precision == "medium" else contextlib.nullcontext():
            for _ in range(steps + 1):
                began.append(time.perf_counter())
                loss = loss_of(x, y)
                x, y = get_batch()
                descend(loss, model, optimizer)
        return list(np.diff(began))

    return run


def net_loop(make: Callable[[Shape], Any], shape: Shape, batch_size: int) -> Round:
    """Any network in the same minimal loop."""
    net, loss_of = make(shape)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    idx = torch.randint(shape.vocab_size, (batch_size, shape.block_size + 1))
    inputs, targets = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()

    def run(steps: int) -> list[float]:
        began = []
        with medium_precision():
            for _ in range(steps + 1):
                began.append(time.perf_counter())
                descend(loss_of(inputs, targets), net, optimizer)
        return list(np.diff(began))

    return run


def descend(loss: Tensor, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Backward pass, clipping and optimizer step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def medium_precision() -> Any:
    """The default `matmul_precision` of LanguageModel."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def matrix_rate(precision: str) -> float:
    """GFLOP/s of a float32 product of 2048 × 2048 matrices; the best of ten."""
    torch.set_float32_matmul_precision(precision)
    a, best = torch.randn(2048, 2048), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    torch.set_float32_matmul_precision("highest")
    return 2 * 2048**3 / best / 1e9


def prepared(**settings: Any) -> TextDataModule:
    data = TextDataModule(**settings)
    data.prepare_data()
    data.setup("fit")
    return data


def lmlight_fit_as_nanogpt() -> Round:
    """`lmlight fit` with nanoGPT's architecture, optimizer, character vocabulary and batches."""
    data = prepared(tokenizer=TokenizerConfig("char"), block_size=64, batch_size=NANOGPT_CPU["batch_size"])
    return lmlight_fit(
        data,
        lambda: LanguageModel(
            net=lambda vocab_size, block_size: Transformer(vocab_size, block_size, 4, 4, 128, **GPT2),
            optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), fused=True),
        ),
    )


Loops = dict[str, Callable[[], Round]]
# The loops of each table by name; the first is the reference.
TABLES: dict[str, Loops] = {
    "the default of `lmlight fit`": {
        "bare loop": lambda: bare_loop(prepared()),
        "lmlight fit": lambda: lmlight_fit(prepared()),
    },
    f"nanoGPT's CPU recipe: {NANOGPT_CPU['batch_size']} windows of 64 characters, 4 layers, width 128": {
        "nanoGPT's loop": partial(nanogpt_loop, "highest"),
        "nanoGPT's loop at matmul precision medium": partial(nanogpt_loop, "medium"),
        "lmlight fit": lmlight_fit_as_nanogpt,
    },
    "GPT-2's architecture, 6 layers, width 384, 4 windows of 256, vocabulary 4,096: networks only": {
        name: partial(net_loop, make, LARGER, 4) for name, make in peers.GPT2_SHAPED.items()
    },
    "Llama's architecture, the same sizes: networks only": {
        name: partial(net_loop, make, LARGER, 4) for name, make in peers.LLAMA_SHAPED.items()
    },
}


def compare(rounds: int, steps: int, loops: dict[str, Round]) -> dict[str, float]:
    """Returns the median seconds of a step in each loop."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name] += loop(steps)[1:]
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(table: str, name: str) -> float:
    """MiB that ten steps add in a separate process."""
    command = [sys.executable, __file__, "--peak", table, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def print_peak(table: str, name: str) -> None:
    loop = TABLES[table][name]()

    def status(field: str) -> float:  # `ru_maxrss` is inherited from the parent process
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 2**10

    if not Path("/proc/self/clear_refs").exists():
        print(float("nan"))  # Linux only
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    loop(10)
    print(status("VmHWM") - before)


def sizes(table: str) -> tuple[int, float, float]:
    """Returns tokens per step, characters per token, and training operations per token."""
    if table.startswith("the default"):
        data = prepared()
        assert data.tokenizer is not None
        net = Transformer(data.tokenizer.vocab_size, data.block_size)
        chars = float(data.tokenizer.char_counts[data.store.ids["train"][:]].mean())
        return data.batch_size * data.block_size, chars, 3 * net.flops_per_token()
    shape, windows = (SMALL, NANOGPT_CPU["batch_size"]) if table.startswith("nanoGPT") else (LARGER, 4)
    preset = LLAMA if table.startswith("Llama") else GPT2
    return windows * shape.block_size, 1.0, 3 * Transformer(**asdict(shape), **preset).flops_per_token()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.peak:
        print_peak(*options.peak)
        return

    rates = {precision: matrix_rate(precision) for precision in ("highest", "medium")}
    versions = f"torch {torch.__version__}, lmlight {lmlight.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    print(f"matrix products: {rates['highest']:.0f} GFLOP/s at precision highest, {rates['medium']:.0f} at medium\n")
    results: dict[str, Any] = {"matrix_gflops": rates}
    for table, loops in TABLES.items():
        tokens, chars, flops = sizes(table)
        seconds = compare(options.rounds, options.steps, {name: make() for name, make in loops.items()})
        first = next(iter(seconds))
        characters = "" if chars == 1 else " characters/s |"
        print(
            f"| {table} | ms per step | tokens/s |{characters} matmul utilization | peak memory, MiB | relative time |"
        )
        print("|---|" + "---|" * (6 if characters else 5))
        for name, value in seconds.items():
            memory = peak_memory(table, name)
            cells = [f"{1e3 * value:.1f}", f"{tokens / value:,.0f}"]
            cells += [f"{tokens * chars / value:,.0f}"] if characters else []
            cells += [f"{flops * tokens / value / 1e9 / rates['medium']:.0%}", f"{memory:,.0f}"]
            print("|", " | ".join([name, *cells, f"{value / seconds[first]:.3f}"]), "|", flush=True)
            results.setdefault(table, {})[name] = {"seconds": value, "peak_mib": memory}
        print()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
