"""Cost of a training step as a function of width, depth, block size and vocabulary size.

    python benchmarks/scaling.py [--repeats 7] [--json FILE]

One size varies; the others are those of `BASE`, the defaults with a vocabulary of 4,096. The power is the slope of a
straight line through the logarithms: of the measured seconds, and of the operations counted by `flops_per_token`. Prints
a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from lmlight.__main__ import set_up_process

set_up_process("fit")  # before torch is imported

import numpy as np
import torch
import torch.nn.functional as F

from lmlight import Transformer
from lmlight.optim import Muon, parameter_groups

BASE = {"vocab_size": 4096, "block_size": 64, "n_layer": 4, "n_embd": 128}
TOKENS = 2048  # per step, for any block size
VARIED = {
    "n_embd": (128, 192, 256, 384, 512),
    "n_layer": (2, 4, 8, 16),
    "block_size": (64, 128, 256, 512, 1024),
    "vocab_size": (1024, 2048, 4096, 8192, 16384),
}


def step_seconds(repeats: int, sizes: dict[str, int]) -> tuple[float, float]:
    """Returns the median time of a step and its operations."""
    net = Transformer(**sizes, n_head=sizes["n_embd"] // 32)
    optimizer = Muon(parameter_groups(net))
    idx = torch.randint(sizes["vocab_size"], (TOKENS // sizes["block_size"], sizes["block_size"] + 1))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        F.cross_entropy(net(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), 3.0 * net.flops_per_token() * TOKENS


def power(sizes: tuple[int, ...], costs: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("medium")
    results = {}
    print("| varied | sizes | ms per step | measured power | power of operations |\n|---|---|---|---|---|")
    for name, sizes in VARIED.items():
        seconds, flops = zip(*(step_seconds(options.repeats, {**BASE, name: size}) for size in sizes))
        measured, theory = power(sizes, list(seconds)), power(sizes, list(flops))
        cells = [name, ", ".join(map(str, sizes)), ", ".join(f"{1e3 * value:.0f}" for value in seconds)]
        print("|", " | ".join([*cells, f"{measured:.2f}", f"{theory:.2f}"]), "|", flush=True)
        results[name] = {"sizes": sizes, "seconds": seconds, "flops": flops, "power": measured, "theory": theory}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
