"""File size and generation speed of the same model in each inference engine.

    python benchmarks/engines.py --ckpt_path FILE [--threads 2 1] [--rounds 5] [--perplexity] [--json FILE]

Exports a checkpoint to each format. Each engine continues a prompt greedily to the end of the block, the limit of
llama.cpp. The engines take turns, each in its own process, because spinning threads of one engine would slow down
another. The table shows medians, and whether the tokens equal lmlight's. With `--perplexity`, llama.cpp encodes all
of tiny Shakespeare, and both score its validation split in non-overlapping windows. Windows are one token shorter than the
block: llama.cpp's server needs room for one. The `lmlight export web` page is skipped without Chromium.
Needs `pip install -e '.[engines,browser]'`. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import http.client
import http.server
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lmlight.__main__ import set_up_process

set_up_process("predict")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
import transformers
import xllamacpp

from lmlight import Sampling
from lmlight.data import corpus
from lmlight.export import command, web
from lmlight.export.model import Model
from lmlight.generation import generate_ids

PROMPT = "ROMEO:\nWhat say you"

Generate = Callable[[list[int], int], list[int]]
"""Continues ids greedily by a number of tokens; returns the new ids."""
Run = Callable[[list[int], int], tuple[float, list[int]]]
"""The same, with the seconds that it took."""


def ours(model: Model) -> Generate:
    def generate(prompt: list[int], new: int) -> list[int]:
        sampling = Sampling(max_new_tokens=new, temperature=0)
        return [step.ids[0] for step in generate_ids(model.net, [prompt], sampling, [0])]

    return generate


def transformers_(folder: Path) -> Generate:
    net = transformers.AutoModelForCausalLM.from_pretrained(folder)

    @torch.inference_mode()
    def generate(prompt: list[int], new: int) -> list[int]:
        idx = torch.tensor([prompt])
        options: dict[str, Any] = dict(max_new_tokens=new, do_sample=False, pad_token_id=0)
        made = net.generate(idx, attention_mask=torch.ones_like(idx), **options)
        return made[0, len(prompt) :].tolist()

    return generate


def torch_export(file: Path) -> Generate:
    """The exported program has no cache, so each token needs a pass over all tokens."""
    net = torch.export.load(file).module()

    @torch.inference_mode()
    def generate(prompt: list[int], new: int) -> list[int]:
        ids = list(prompt)
        for _ in range(new):
            ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]

    return generate


def onnxruntime_(file: Path, threads: int) -> Generate:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    n_layer, two, _, heads, _, head_size = session.get_inputs()[1].shape

    def generate(prompt: list[int], new: int) -> list[int]:
        past, fresh, made = np.zeros((n_layer, two, 1, heads, 0, head_size), np.float32), prompt, list[int]()
        for _ in range(new):
            logits, past = session.run(None, {"ids": np.array([fresh]), "past": past})
            fresh = [int(logits[0, -1].argmax())]
            made += fresh
        return made

    return generate


class LlamaCpp:
    """The server of llama.cpp. With `plain`, it has a float32 cache and no flash attention, like lmlight."""

    def __init__(self, file: Path, threads: int, plain: bool = False) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_parallel, params.n_gpu_layers = 1, 0  # the context size is that of the file
        params.warmup = params.fit_params = False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if plain:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)
        self.connection = http.client.HTTPConnection(urlsplit(self.server.listening_address).netloc, timeout=600)

    def ask(self, route: str, **body: Any) -> Any:
        self.connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        answer = json.load(self.connection.getresponse())
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"]["message"])
        return answer

    def __call__(self, prompt: list[int], new: int) -> list[int]:
        self.connection.close()  # the server closes idle connections
        settings = {"temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self.ask("/completion", prompt=prompt, n_predict=new, **settings)["tokens"]

    def nats(self, before: list[int], token: int) -> float:
        """Negative log-likelihood of `token`. A bias forces the token; the reported probability excludes the bias."""
        settings = {"n_predict": 1, "temperature": 0, "n_probs": 1, "logit_bias": [[token, 1000.0]]}
        answer = self.ask("/completion", prompt=before, cache_prompt=True, **settings)
        (one,) = answer["completion_probabilities"]
        assert one["id"] == token
        return -one["logprob"]


@contextlib.contextmanager
def page(folder: Path) -> Iterator[Run]:
    """Runs the page of `lmlight export web` in headless Chromium, on one thread. The page measures the time."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    handler = functools.partial(web._Handler, directory=folder)
    try:
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            driver.get(f"http://127.0.0.1:{server.server_port}/index.html")
            code = """const [ids, count, done] = arguments;
                import(new URL("model.js", location)).then(async ({ Model, Stream, draw, probabilities, startEngine }) => {
                  const file = async () => new Uint8Array(await (await fetch("model.onnx")).arrayBuffer());
                  globalThis.model ??= await Model.open(await file(), await startEngine("wasm"));
                  const began = performance.now();
                  const stream = new Stream(model, ids);
                  const written = [];
                  while (written.length < count) {
                    written.push(draw(probabilities(await stream.next(), { temperature: 0 }), 0));
                    stream.push(written.at(-1));
                  }
                  return [(performance.now() - began) / 1000, written];
                }).then(done);"""
            yield lambda prompt, new: driver.execute_async_script(code, prompt, new)
            server.shutdown()
    finally:
        driver.quit()


def timed(generate: Generate) -> Run:
    def run(prompt: list[int], new: int) -> tuple[float, list[int]]:
        began = time.perf_counter()
        ids = generate(prompt, new)
        return time.perf_counter() - began, ids

    return run


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def export(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """Exports the checkpoint to each format; returns paths by format."""
    paths = {"checkpoint": checkpoint}
    for name, words in {
        "hf": ["hf"],
        "onnx": ["onnx"],
        "torch": ["torch"],
        "web": ["web"],
        **{f"gguf {kind}": ["gguf", "--precision", kind] for kind in ("f32", "f16", "q8_0")},
    }.items():
        target = folder / {"hf": "hf", "web": "web", "torch": "model.pt2"}.get(name, "model-" + name.replace(" ", "."))
        with contextlib.redirect_stdout(io.StringIO()):
            command.export([*words, str(checkpoint), str(target)])
        paths[name] = target
    return paths


ENGINES: dict[str, tuple[str, Callable[[Path, int], Generate]]] = {
    "lmlight": ("checkpoint", lambda file, _: ours(Model.read(file))),
    "transformers": ("hf", lambda file, _: transformers_(file)),
    "llama.cpp f32": ("gguf f32", lambda file, threads: LlamaCpp(file, threads, plain=True)),
    "llama.cpp f16": ("gguf f16", LlamaCpp),
    "llama.cpp q8_0": ("gguf q8_0", LlamaCpp),
    "onnxruntime": ("onnx", onnxruntime_),
    "torch.export, without a cache": ("torch", lambda file, _: torch_export(file)),
}
"""The format of each engine, and a function of the file and the number of threads that makes it."""
BROWSER = "the page in Chromium"


def work(name: str, file: Path, threads: int, orders: Connection) -> None:
    """Runs one engine in its own process. For each order, sends the seconds of each repeat and the new ids."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.disable()  # see benchmarks/generation.py
    with page(file) if name == BROWSER else contextlib.nullcontext() as browser:
        run = browser or timed(ENGINES[name][1](file, threads))
        while order := orders.recv():
            prompt, new, repeats = order
            ids = run(prompt, new)[1]  # warm-up
            orders.send(([run(prompt, new)[0] for _ in range(repeats)], ids))


def speeds(model: Model, paths: dict[str, Path], threads: list[int], rounds: int, repeats: int) -> dict[str, Any]:
    """Prints the table of sizes and speeds."""
    prompt = model.tokenizer.encode(PROMPT)
    new = model.net.block_size - len(prompt)
    files = {name: paths[kind] for name, (kind, _) in ENGINES.items()}
    jobs = [(name, count) for name in files for count in threads]
    if shutil.which("chromedriver"):
        files[BROWSER] = paths["web"]
        jobs.append((BROWSER, 1))
    spawn, orders = multiprocessing.get_context("spawn"), dict[tuple[str, int], Any]()
    for name, count in jobs:
        orders[name, count], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(name, files[name], count, theirs), daemon=True).start()
        orders[name, count].send((prompt, new, 1))
        orders[name, count].recv()
    seconds: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
    written: dict[tuple[str, int], list[int]] = {}
    for _ in range(rounds):
        for job in jobs:
            orders[job].send((prompt, new, repeats))
            times, written[job] = orders[job].recv()
            seconds[job] += times
    for job in jobs:
        orders[job].send(None)
    heads = [f"ms per token, {count} thread{'s' * (count > 1)}" for count in threads]
    print(f"| {new} tokens after {len(prompt)}, greedy | file, MB |", " | ".join(heads), "| tokens equal to lmlight |")
    print("|---|---|" + "---|" * len(heads) + "---|")
    results = {}
    for name, file in files.items():
        medians = {count: statistics.median(seconds[name, count]) / new for count in threads if (name, count) in jobs}
        ids = next(written[job] for job in jobs if job[0] == name)
        expected = written[jobs[0]]
        same = next((at for at, pair in enumerate(zip(ids, expected)) if len({*pair}) > 1), new)
        times = [f"{1e3 * medians[count]:.2f}" if count in medians else "" for count in threads]
        cells = [f"{size(file) / 1e6:.2f}", *times, "all" if same == new else f"the first {same}"]
        print("|", " | ".join([name, *cells]), "|", flush=True)
        results[name] = {"bytes": size(file), "seconds": medians, "same": same}
    return results


@torch.inference_mode()
def perplexity(model: Model, paths: dict[str, Path], windows: int | None) -> dict[str, Any]:
    """Prints the table of ids and perplexities over the validation text."""
    whole = corpus.load("tinyshakespeare").text
    _, text = corpus.split(whole, 0.1)
    ids, block = model.tokenizer.encode(text), model.net.block_size - 1  # the server needs room after the prompt
    starts = range(0, len(ids) - 1, block)[:windows]
    ours = 0.0
    for start in starts:
        row = torch.tensor(ids[start : start + block + 1])
        ours += F.cross_entropy(model.net(row[None, :-1])[0], row[1:], reduction="sum").item()
    count = min(len(ids) - 1, len(starts) * block)
    results: dict[str, Any] = {"tokens": count, "lmlight": math.exp(ours / count)}
    print(
        f"\n| {count:,} validation tokens | ids of the whole text | perplexity | relative difference |\n|---|---|---|---|"
    )
    print(f"| lmlight | | {results['lmlight']:.4f} | |", flush=True)
    for kind in ("f32", "f16", "q8_0"):
        engine = LlamaCpp(paths[f"gguf {kind}"], torch.get_num_threads(), plain=kind == "f32")
        theirs = engine.ask("/tokenize", content=whole, add_special=False, parse_special=False)["tokens"]
        nats = 0.0
        for start in starts:
            row = ids[start : start + block + 1]
            nats += sum(engine.nats(row[:at], row[at]) for at in range(1, len(row)))
        value = math.exp(nats / count)
        same, off = (
            "identical" if theirs == model.tokenizer.encode(whole) else "different",
            value / results["lmlight"] - 1,
        )
        print(f"| llama.cpp {kind} | {same} | {value:.4f} | {off:+.4%} |", flush=True)
        results[f"llama.cpp {kind}"] = {"ids": same, "perplexity": value}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, help="a transformer trained on tiny Shakespeare with unigram pieces"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="texts per engine and round")
    parser.add_argument("--perplexity", action="store_true")
    parser.add_argument("--windows", type=int, help="number of validation windows to score (default: all)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    packages = ("lmlight", "torch", "transformers", "xllamacpp", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    libraries = ", ".join(json.loads((web.PAGE / "libraries.json").read_text("utf-8")))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {libraries}\n")
    model = Model.read(options.ckpt_path)
    with tempfile.TemporaryDirectory() as folder:
        paths = export(options.ckpt_path, Path(folder))
        results: dict[str, Any] = {"speeds": speeds(model, paths, options.threads, options.rounds, options.repeats)}
        if options.perplexity:
            results["perplexity"] = perplexity(model, paths, options.windows)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
