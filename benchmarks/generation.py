"""How fast is text generated, against other libraries and against the memory's speed?

    python benchmarks/generation.py [--rounds 5] [--json FILE]

The shape is nanoGPT's for one GPU: 6 layers, width 384, context 256, float32, 65 characters. A prompt of 56 tokens and 200
new ones stay within the context; everything is measured in alternating rounds of one process, medians are given.

The floor of one stream is the time of its matrix-vector products alone, the weights read once from memory for each token:
by torch's `linear`, and as lmlight's `pack_linear` does it, whichever is faster on the machine.
The roofline of many streams is the time of reading the weights and the cache's filled part once a step, at the rate at
which a large array can be summed; beside it, the time of the products alone, which is longer. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `lmlight predict` has it

import peers
import torch
import torch.nn.functional as F
from peers import Shape
from torch import nn

import lmlight
from lmlight import Sampling, Transformer
from lmlight.generation import generate_ids
from lmlight.generation.fast_decoder import pack_linear
from lmlight.models import GPT2, LLAMA, Net

SHAPE = Shape(65, 256, 6, 6, 384)
PROMPT, NEW = 56, 200

Write = Callable[[list[int], int], Any]
"""Continues a prompt by so many tokens."""


def ours(net: Net) -> Write:
    def write(prompt: list[int], new: int) -> None:
        for _ in generate_ids(net, [prompt], Sampling(max_new_tokens=new), [1337]):
            pass

    return write


def cropping(make: Callable[[Shape], Any], **options: Any) -> Write:
    """nanoGPT's and minGPT's own `generate`."""
    net = make(SHAPE)[0].eval()

    @torch.inference_mode()
    def write(prompt: list[int], new: int) -> None:
        net.generate(torch.tensor([prompt]), new, **options)

    return write


def transformers_(make: Callable[[Shape], Any]) -> Write:
    net = make(SHAPE)[0].eval()

    @torch.inference_mode()
    def write(prompt: list[int], new: int) -> None:
        idx = torch.tensor([prompt])
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
        net.generate(idx, attention_mask=torch.ones_like(idx), **options)

    return write


def litgpt() -> Write:
    """litgpt's net with its cache, in the loop of its `generate/base.py`, which drags in the rest of the package."""
    net = peers.litgpt(SHAPE)[0].eval()

    @torch.inference_mode()
    def write(prompt: list[int], new: int) -> None:
        net.set_kv_cache(batch_size=1)
        idx, position = torch.tensor([prompt]), torch.arange(len(prompt))
        for _ in range(new):
            logits = net(idx, position, input_pos_maxp1=int(position[-1]) + 1)[:, -1]
            idx = logits.softmax(-1).multinomial(1)
            position = position[-1:] + 1

    return write


def floor(net: nn.Module, plain: bool, rows: int = 1) -> Write:
    """The products of one step with the weights, nothing between them: with torch's linear, or as lmlight does it."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]
    products = [partial(F.linear, weight=layer.weight) if plain else pack_linear(layer, rows) for layer in layers]

    @torch.inference_mode()
    def write(_: list[int], new: int) -> None:
        for _ in range(new):
            for x, multiply in zip(inputs, products):
                multiply(x)

    return write


def read_rate() -> float:
    """Bytes per second at which an array much larger than the processor's caches is summed; the best of ten."""
    array, best = torch.ones(2**27), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - began)
    return array.nbytes / best


def seconds_of(rounds: int, tasks: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of each task, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def step_times(net: Net, batch: int, prompt: int, new: int) -> list[float]:
    """Seconds of each step after the prompt's."""
    began, times = time.perf_counter(), []
    prompts = torch.randint(net.vocab_size, (batch, prompt)).tolist()
    for _ in generate_ids(net, prompts, Sampling(max_new_tokens=new), list(range(batch))):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return times[1:]


def one_stream(rounds: int) -> dict[str, float]:
    gpt2, llama, default = (Transformer(**SHAPE.__dict__, **preset).eval() for preset in (GPT2, LLAMA, {}))
    writers = {
        "lmlight, GPT-2's architecture": ours(gpt2),
        "its matrix-vector products alone, lmlight's way": floor(gpt2, plain=False),
        "its matrix-vector products alone, torch's way": floor(gpt2, plain=True),
        "nanoGPT": cropping(peers.nanogpt),
        "minGPT": cropping(peers.mingpt, do_sample=True),
        "transformers, GPT-2": transformers_(peers.hf_gpt2),
        "lmlight, its default architecture": ours(default),
        "lmlight, Llama's architecture": ours(llama),
        "transformers, Llama": transformers_(peers.hf_llama),
        "litgpt, Llama's architecture": litgpt(),
    }
    prompt = torch.randint(65, (PROMPT,)).tolist()
    seconds = seconds_of(rounds, {name: (lambda w=write: w(prompt, NEW)) for name, write in writers.items()})
    first = next(iter(seconds))
    print("| one stream, 200 tokens after 56 | ms a token | tokens/s | lmlight is faster by |\n|---|---|---|---|")
    for name, value in seconds.items():
        cells = [f"{1e3 * value / NEW:.2f}", f"{NEW / value:,.0f}", f"{value / seconds[first]:.2f}"]
        print("|", " | ".join([name, *cells]), "|", flush=True)
    return {name: value / NEW for name, value in seconds.items()}


def many_streams(rounds: int) -> dict[str, Any]:
    net, rate = Transformer(**SHAPE.__dict__, **GPT2).eval(), read_rate()
    weights = sum(module.weight.nbytes for module in net.modules() if isinstance(module, nn.Linear))
    print(f"\nAn array is summed at {rate / 1e9:.1f} GB/s.\n")
    print("| streams | context | ms a step | products alone | tokens/s | of the roofline | of one stream's |")
    print("|---|---|---|---|---|---|---|")
    results: dict[str, Any] = {"bytes_per_second": rate}
    for batch in (1, 8, 32):
        alone = floor(net, plain=False, rows=batch)
        products = seconds_of(rounds, {"": lambda w=alone: w([], 20)})[""] / 20
        for context in (32, 128, 248):
            times = [statistics.median(step_times(net, batch, context - 8, 17)) for _ in range(rounds)]
            seconds = statistics.median(times)
            kept = 2 * batch * len(net.blocks) * context * SHAPE.n_embd * 4
            share = (weights + kept) / rate / seconds
            if batch == 1:
                results[f"one at {context}"] = seconds
            gain = batch * results[f"one at {context}"] / seconds
            print(
                f"| {batch} | {context} | {1e3 * seconds:.2f} | {1e3 * products:.2f} | {batch / seconds:,.0f} | {share:.0%} "
                f"| {gain:.1f} |",
                flush=True,
            )
            figures = {"seconds": seconds, "products": products, "of_roofline": share, "gain": gain}
            results[f"{batch} at {context}"] = figures
    return results


def prompts_and_windows(rounds: int) -> dict[str, float]:
    nets = {"learned": Transformer(**SHAPE.__dict__, **GPT2).eval(), "rotary": Transformer(**SHAPE.__dict__).eval()}
    prompt = torch.randint(65, (200,)).tolist()
    sampling = Sampling(max_new_tokens=1)
    passes = seconds_of(
        rounds, {name: (lambda n=net: list(generate_ids(n, [prompt], sampling, [1]))) for name, net in nets.items()}
    )
    results = {f"prefill {name}": value for name, value in passes.items()}
    print("\n| positions | prompt of 200, ms | ms a token within the block | beyond it, median | mean | longest |")
    print("|---|---|---|---|---|---|")
    for name, net in nets.items():
        times = step_times(net, 1, 8, 760)
        within, beyond = times[150:240], times[260:]
        figures = [
            passes[name],
            statistics.median(within),
            statistics.median(beyond),
            statistics.mean(beyond),
            max(beyond),
        ]
        results |= {f"within {name}": figures[1], f"beyond {name}": figures[3]}
        print(f"| {name} | " + " | ".join(f"{1e3 * value:.2f}" for value in figures) + " |", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    gc.disable()  # the peers' imports leave a million objects, and whoever allocates next pays for looking through them
    warnings.simplefilter("ignore")
    versions = f"torch {torch.__version__}, lmlight {lmlight.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}\n")
    results = {
        "one stream, seconds a token": one_stream(options.rounds),
        "many streams": many_streams(options.rounds),
        "prompts and windows": prompts_and_windows(options.rounds),
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
