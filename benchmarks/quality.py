"""Loss and training time of lmlight's recipes, compared with nanoGPT's CPU recipe on the same machine.

    python benchmarks/quality.py [--runs CONFIG[@STEPS][#SEED,...][^TEACHERS] ...] [--json FILE] [--picture FILE]

Losses are in nats per character of the last 10% of tiny Shakespeare. Each character is scored once, in non-overlapping
windows of block_size; nanoGPT's final model is scored in the same way. Training time excludes validation for both. The time
of the whole process includes everything. Every seed is reported, at the final and at the best step. Prints a Markdown table.
The picture shows the loss over training time.

`^2` is for configs with `model_class: lmlight.DistilledModel`: the teachers are two runs of the nearest earlier entry
without `^`, a different pair per seed. The run's time includes theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lmlight.__main__ import set_up_process

set_up_process("fit")  # before torch is imported

import numpy as np
import peers
import torch

from lmlight.commands import curves
from lmlight.data import corpus
from lmlight.data.tokenizer import CharTokenizer
from lmlight.data.windows import eval_windows


def timed(command: list[str], cwd: Path) -> list[tuple[float, str]]:
    """Runs a command; returns each line of its output with the seconds since its start."""
    began, lines = time.perf_counter(), []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(command, cwd=cwd, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line.rstrip()))
    if process.returncode:
        raise RuntimeError("\n".join(line for _, line in lines[-20:]))
    lines.append((time.perf_counter() - began, "end"))
    return lines


HERE = Path(__file__).absolute().parent


def run_nanogpt(folder: Path) -> dict[str, Any]:
    """Runs nanoGPT's train.py with the CPU flags of its README. N is the time of its steps, without evaluations."""
    text = corpus.load("tinyshakespeare").text
    train, val = corpus.split(text, 0.1)
    tokenizer = CharTokenizer(sorted(set(text)))
    place = peers.fetched(peers.NANOGPT) / "nanogpt"
    data = place / "data" / "shakespeare_char"
    for name, part in (("train", train), ("val", val)):
        np.array(tokenizer.encode(part), dtype=np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size}))  # the default is that of GPT-2
    flags = {"device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "lr_decay_iters": 2000}
    flags |= {**peers.NANOGPT_CPU, "out_dir": str(folder), "dataset": "shakespeare_char"}
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"]
    lines = timed([*command, *(f"--{name}={value}" for name, value in flags.items())], place)
    iterations = [re.fullmatch(r"iter (\d+): .* time ([\d.]+)ms.*", line) for _, line in lines]
    steps = [(int(found[1]), float(found[2]) / 1e3) for found in iterations if found]
    # the printed time of a step with an evaluation includes the evaluation, so use the median
    usual = statistics.median(seconds for step, seconds in steps if step % 250)
    training = sum(seconds if step % 250 else usual for step, seconds in steps if step)

    content = torch.load(folder / "ckpt.pt", weights_only=True)
    module = peers.nanogpt_module()
    model = module.GPT(module.GPTConfig(**content["model_args"])).eval()
    model.load_state_dict(content["model"])
    ids, nats = tokenizer.encode(train)[-1:] + tokenizer.encode(val), 0.0
    with torch.no_grad():
        for start, length, _ in eval_windows(len(ids), 64, 64):
            window = torch.tensor(ids[start : start + length + 1])
            _, loss = model(window[None, :-1], window[None, 1:])
            nats += loss.item() * length
    figure = nats / len(val)
    said = [re.match(r"step (\d+): .* val loss ([\d.]+)", line) for _, line in lines]
    curve = [(training * int(found[1]) / 2000, float(found[2])) for found in said if found]
    times = {"training": training, "process": lines[-1][0]}
    return {"name": "nanoGPT, CPU recipe", **times, "final": figure, "best": figure, "curve": curve}


def run_lmlight(
    config: Path, max_steps: str, seed: str, folder: Path, teachers: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Trains a config, for `max_steps` if that is not empty."""
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
    if teachers:
        command.append(f"--model.teachers={json.dumps([row['checkpoint'] for row in teachers])}")
    lines = timed(command, folder)
    (checkpoint,) = (line.split()[2] for _, line in lines if line.startswith("Best checkpoint: "))
    validations = curves.read((folder / checkpoint).parent.parent, "seconds")
    curve = [(row["seconds"], row["val/nats_per_char"]) for row in validations]
    training, figures = curve[-1][0], [nats for _, nats in curve]
    before = sum(row["training"] for row in teachers or [])
    return {
        "name": f"{config.stem}, seed {seed}, {validations[-1]['step']:.0f} steps"
        + (f", {len(teachers)} teachers" if teachers else ""),
        "training": before + training,
        "process": lines[-1][0] + sum(row["process"] for row in teachers or []),
        "final": figures[-1],
        "best": min(figures),
        "curve": [(before + seconds, nats) for seconds, nats in curve],
        "checkpoint": checkpoint,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colors = dict[str, str]()  # one for each recipe
    for row in rows:
        recipe = re.sub(r", seed \d+", "", row["name"])
        label = None if recipe in colors else recipe
        color = colors.setdefault(recipe, f"C{len(colors)}")
        seconds, nats = zip(*(point for point in row["curve"] if point[0] > 0))
        axes.plot(seconds, nats, marker="o", markersize=3, color=color, label=label)
    axes.set(xlabel="seconds of training", ylabel="nats per character, validation", xscale="log", ylim=(None, 2.6))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="*", default=[str(HERE.parent / "configs" / "shakespeare.yaml")])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows, without_teachers = [], list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        rows.append(run_nanogpt(Path(folder)))
        for run in options.runs:
            found = re.fullmatch(r"(.*?)(?:@(\d+))?(?:#([\d,]+))?(?:\^(\d+))?", run)
            assert found is not None
            seeds, new = (found[3] or "1337").split(","), list[dict[str, Any]]()
            for number, seed in enumerate(seeds):
                turned = without_teachers[number + 1 :] + without_teachers[: number + 1]
                teachers = turned[: int(found[4])] if found[4] else None
                new.append(run_lmlight(Path(found[1]), found[2] or "", seed, Path(folder), teachers))
                print(new[-1], file=sys.stderr, flush=True)
            rows += new
            without_teachers = without_teachers if found[4] else new
    n, whole = rows[0]["training"], rows[0]["process"]
    print("| | training | whole process | nats/char, final | best |\n|---|---|---|---|---|")
    for row in rows:
        training = f"{row['training']:.1f} s, {row['training'] / n:.2f} N"
        process = f"{row['process']:.1f} s, {row['process'] / whole:.2f} of nanoGPT's"
        print(f"| {row['name']} | {training} | {process} | {row['final']:.4f} | {row['best']:.4f} |")
    if options.picture:
        draw(rows, options.picture)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
