"""Generation speed, compared with other libraries and with memory bandwidth.

    python benchmarks/generation.py [--rounds 5] [--json FILE]

The shape is nanoGPT's for one GPU: 6 layers, width 384, context 256, float32, 65 characters. A prompt of 56 tokens and 200
new tokens fit the context. All engines take turns in one process; the tables show medians.

The floor of one stream is the time of its matrix-vector products, which read the weights once per token: with torch's
`linear`, and with lmlight's `pack_linear`.
The roofline of many streams is the time to read the weights and the filled part of the cache once per step, at the rate at
which a large array can be summed. The time of the matrix products, which is longer, is given, too. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lmlight.__main__ import set_up_process

set_up_process("predict")  # before torch is imported

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

Generate = Callable[[list[int], int], Any]
"""Continues a prompt by a number of tokens."""


def ours(net: Net) -> Generate:
    def generate(prompt: list[int], new: int) -> None:
        for _ in generate_ids(net, [prompt], Sampling(max_new_tokens=new, temperature=1, min_p=None), [1337]):
            pass

    return generate


def cropping(make: Callable[[Shape], Any], **options: Any) -> Generate:
    """`generate` of nanoGPT and minGPT."""
    net = make(SHAPE)[0].eval()

    @torch.inference_mode()
    def generate(prompt: list[int], new: int) -> None:
        net.generate(torch.tensor([prompt]), new, **options)

    return generate


def transformers_(make: Callable[[Shape], Any]) -> Generate:
    net = make(SHAPE)[0].eval()

    @torch.inference_mode()
    def generate(prompt: list[int], new: int) -> None:
        idx = torch.tensor([prompt])
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
        net.generate(idx, attention_mask=torch.ones_like(idx), **options)

    return generate


def litgpt() -> Generate:
    """litgpt's network and cache in the loop of its `generate/base.py`, which would import the whole package."""
    net = peers.litgpt(SHAPE)[0].eval()

    @torch.inference_mode()
    def generate(prompt: list[int], new: int) -> None:
        net.set_kv_cache(batch_size=1)
        idx, position = torch.tensor([prompt]), torch.arange(len(prompt))
        for _ in range(new):
            logits = net(idx, position, input_pos_maxp1=int(position[-1]) + 1)[:, -1]
            idx = logits.softmax(-1).multinomial(1)
            position = position[-1:] + 1

    return generate


def floor(net: nn.Module, plain: bool, rows: int = 1) -> Generate:
    """The products with the weights in one step and nothing else, with torch's or lmlight's linear layers."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]
    products = [partial(F.linear, weight=layer.weight) if plain else pack_linear(layer, rows) for layer in layers]

    @torch.inference_mode()
    def generate(_: list[int], new: int) -> None:
        for _ in range(new):
            for x, multiply in zip(inputs, products):
                multiply(x)

    return generate


def read_rate() -> float:
    """Bytes per second of summing an array much larger than the CPU caches; the best of ten."""
    array, best = torch.ones(2**27), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - began)
    return array.nbytes / best


def seconds_of(rounds: int, tasks: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of each task. The tasks take turns."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def step_times(net: Net, batch: int, prompt: int, new: int) -> list[float]:
    """Seconds of each step after the prompt."""
    began, times = time.perf_counter(), []
    prompts = torch.randint(net.vocab_size, (batch, prompt)).tolist()
    for _ in generate_ids(net, prompts, Sampling(max_new_tokens=new, temperature=1, min_p=None), list(range(batch))):
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return times[1:]


def one_stream(rounds: int) -> dict[str, float]:
    gpt2, llama, default = (Transformer(**SHAPE.__dict__, **preset).eval() for preset in (GPT2, LLAMA, {}))
    generators = {
        "lmlight, GPT-2's architecture": ours(gpt2),
        "its matrix-vector products, lmlight's layers": floor(gpt2, plain=False),
        "its matrix-vector products, torch's layers": floor(gpt2, plain=True),
        "nanoGPT": cropping(peers.nanogpt),
        "minGPT": cropping(peers.mingpt, do_sample=True),
        "transformers, GPT-2": transformers_(peers.hf_gpt2),
        "lmlight, its default architecture": ours(default),
        "lmlight, Llama's architecture": ours(llama),
        "transformers, Llama": transformers_(peers.hf_llama),
        "litgpt, Llama's architecture": litgpt(),
    }
    prompt = torch.randint(65, (PROMPT,)).tolist()
    seconds = seconds_of(rounds, {name: (lambda g=generate: g(prompt, NEW)) for name, generate in generators.items()})
    first = next(iter(seconds))
    print(
        "| one stream, 200 tokens after 56 | ms per token | tokens/s | time relative to the first |\n|---|---|---|---|"
    )
    for name, value in seconds.items():
        cells = [f"{1e3 * value / NEW:.2f}", f"{NEW / value:,.0f}", f"{value / seconds[first]:.2f}"]
        print("|", " | ".join([name, *cells]), "|", flush=True)
    return {name: value / NEW for name, value in seconds.items()}


def many_streams(rounds: int) -> dict[str, Any]:
    net, rate = Transformer(**SHAPE.__dict__, **GPT2).eval(), read_rate()
    weights = sum(module.weight.nbytes for module in net.modules() if isinstance(module, nn.Linear))
    print(f"\nMemory read rate: {rate / 1e9:.1f} GB/s.\n")
    print(
        "| streams | context | ms per step | products, ms | tokens/s | share of roofline | tokens/s relative to one stream |"
    )
    print("|---|---|---|---|---|---|---|")
    results: dict[str, Any] = {"bytes_per_second": rate}
    for batch in (1, 8, 32):
        alone = floor(net, plain=False, rows=batch)
        products = seconds_of(rounds, {"": lambda g=alone: g([], 20)})[""] / 20
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
    sampling = Sampling(max_new_tokens=1, temperature=1, min_p=None)
    passes = seconds_of(
        rounds, {name: (lambda n=net: list(generate_ids(n, [prompt], sampling, [1]))) for name, net in nets.items()}
    )
    results = {f"prefill {name}": value for name, value in passes.items()}
    print("\n| positions | prompt of 200, ms | ms per token within the block | beyond it, median | mean | maximum |")
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
    gc.disable()  # the imports leave a million objects; scanning them would slow down whichever task allocates next
    warnings.simplefilter("ignore")
    versions = f"torch {torch.__version__}, lmlight {lmlight.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}\n")
    results = {
        "one stream, seconds per token": one_stream(options.rounds),
        "many streams": many_streams(options.rounds),
        "prompts and windows": prompts_and_windows(options.rounds),
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
