"""How good, after how long? Recipes of lmlight's beside nanoGPT's CPU recipe, all in one run on one machine.

    python benchmarks/quality.py [--configs configs/shakespeare.yaml[@STEPS] ...] [--seeds 1337 ...] [--json FILE]

Every figure is in nats per character of the last 10% of tiny Shakespeare, each character scored once in windows of the
block size that do not overlap; nanoGPT's final model is scored the same way. Every seed is reported, at the final step
as well as at the best. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nanogpt
import numpy as np
import torch

from lmlight.data import corpus
from lmlight.data.sampler import scored_windows
from lmlight.data.tokenizer import CharTokenizer


def timed(command: list[str], cwd: Path) -> list[tuple[float, str]]:
    """Runs a command; each line that it prints, with the seconds since it was started."""
    began, lines = time.perf_counter(), []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
    with subprocess.Popen(command, cwd=cwd, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line.rstrip()))
    if process.returncode:
        raise RuntimeError("\n".join(line for _, line in lines[-20:]))
    lines.append((time.perf_counter() - began, "end"))
    return lines


def run_nanogpt(folder: Path) -> dict[str, Any]:
    """nanoGPT's train.py with its README's flags for a CPU; N is the time from its first step to its last."""
    text = corpus.load("tinyshakespeare").text
    train, val = corpus.split(text, 0.1)
    tokenizer = CharTokenizer(sorted(set(text)))
    data = nanogpt.folder() / "data" / "shakespeare_char"
    for name, part in (("train", train), ("val", val)):
        np.array(tokenizer.encode(part), dtype=np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size}))  # else it takes GPT-2's
    flags = {"device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 100, "lr_decay_iters": 2000}
    flags |= {**nanogpt.CPU_RECIPE, "out_dir": str(folder), "dataset": "shakespeare_char"}
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"]
    lines = timed([*command, *(f"--{name}={value}" for name, value in flags.items())], nanogpt.folder())
    first = next(seconds for seconds, line in lines if line.startswith("iter 0:"))
    last = next(seconds for seconds, line in lines if line.startswith("iter 2000:"))

    content = torch.load(folder / "ckpt.pt", weights_only=True)
    module = nanogpt.model()
    model = module.GPT(module.GPTConfig(**content["model_args"])).eval()
    model.load_state_dict(content["model"])
    ids, nats = tokenizer.encode(train)[-1:] + tokenizer.encode(val), 0.0
    with torch.no_grad():
        for start, length, _ in scored_windows(len(ids), 64, 64):
            window = torch.tensor(ids[start : start + length + 1])
            _, loss = model(window[None, :-1], window[None, 1:])
            nats += loss.item() * length
    figure = nats / len(val)
    times = {"training": last - first, "process": lines[-1][0]}
    return {"name": "nanoGPT, CPU recipe", **times, "final": figure, "best": figure}


def run_lmlight(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """A config, or `CONFIG@STEPS` for its schedule squeezed into so many steps."""
    path, _, max_steps = recipe.partition("@")
    config = Path(path)
    command = [
        sys.executable,
        "-u",
        "-m",
        "lmlight",
        "fit",
        f"--config={config.absolute()}",
        f"--seed_everything={seed}",
    ]
    if max_steps:
        command.append(f"--trainer.max_steps={max_steps}")
    lines = timed(command, folder)
    steps = [line.split() for _, line in lines if line.startswith("step ")]
    figures = [float(words[words.index("val/nats_per_char") + 1]) for words in steps]
    of = re.search(r"\d+$", steps[-1][1])
    assert of is not None
    return {
        "name": f"{config.stem}, seed {seed}, {of[0]} steps",
        "training": float(steps[-1][-2]),
        "process": lines[-1][0],
        "final": figures[-1],
        "best": min(figures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parents[1] / "configs"
    parser.add_argument("--configs", nargs="*", default=[str(here / "shakespeare.yaml")])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1337])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows.append(run_nanogpt(Path(folder)))
        for recipe in options.configs:
            rows += [run_lmlight(recipe, seed, Path(folder)) for seed in options.seeds]
    n, whole = rows[0]["training"], rows[0]["process"]
    print("| | training | whole process | nats/char, final | best |\n|---|---|---|---|---|")
    for row in rows:
        training = f"{row['training']:.1f} s, {row['training'] / n:.2f} N"
        process = f"{row['process']:.1f} s, {row['process'] / whole:.2f} of nanoGPT's"
        print(f"| {row['name']} | {training} | {process} | {row['final']:.4f} | {row['best']:.4f} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
