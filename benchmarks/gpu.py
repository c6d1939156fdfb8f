"""All GPU checks and benchmarks, in less than ten minutes.

    python benchmarks/gpu.py --fetch FILES                                  # on a machine with network access
    python benchmarks/gpu.py --out OUT --files FILES [--sections correct record throughput generation] [--minutes 9]

The GPU machine needs torch 2.11 or later, lightning, sentencepiece, torchmetrics, tensorboard and matplotlib; no network.
`--fetch` downloads what else is needed into FILES: tiny Shakespeare as `input.txt`, and wheels. Wheels of packages that are
not installed are unpacked into a temporary folder; nothing is installed.

- correct: training, resume, scoring and generation on the GPU against the CPU; precisions, strategies, compilation.
- record: recipes of tiny Shakespeare: the final loss, and the seconds until it reaches nanoGPT's.
- throughput: the smallest GPT-2: tokens/s, the matmul utilization, and the overhead of Lightning and callbacks.
- generation: tokens/s against transformers, and the time to read the weights from memory.

Each section is a process with its own time limit. It writes `OUT/SECTION.json` after every measurement, so a crash or
timeout loses at most one, and adds its table to `OUT/report.md` at its end. `--device cpu --tiny` runs the same
code in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("lmlight") is None:
    sys.path.insert(0, str(ROOT))

# shares of the time limit, in the order of the sections
SHARES = {"correct": 4, "record": 3, "throughput": 4, "generation": 2}
NEEDED = (
    *("torch", "lightning", "sentencepiece", "torchmetrics", "tensorboard", "matplotlib", "fsspec"),
    *("jsonargparse", "docstring_parser", "typeshed_client", "platformdirs"),
)
WHEELS = (
    "jsonargparse>=4.53,<5",
    "docstring-parser",
    "typeshed-client",
    "importlib-resources",
    "platformdirs",
)
NANOGPT_NATS = 1.4697  # nats/char of nanoGPT's character-level GPU recipe, from its README
CURVE_ALONE = "--trainer.callbacks=lmlight.training.callbacks.LearningCurve"
KILL_AT = "GPU_BENCHMARK_KILL_AT"


class Report:
    """The measurements of one section, in a JSON file.

    Args:
        out: folder of the file.
        section: name of the file.
    """

    def __init__(self, out: Path, section: str) -> None:
        self._out, self._section, self.rows = out, section, list[dict[str, Any]]()

    def measure(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Runs a measurement and adds its row; an exception becomes the row's `error`."""
        began, row = time.perf_counter(), dict[str, Any](name=name)
        print(f"--- {self._section}: {name}", flush=True)
        try:
            row |= function()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row["seconds_in_all"] = round(time.perf_counter() - began, 2)
        self.rows.append(row)
        text = json.dumps({"environment": environment(), "rows": self.rows}, indent=1, default=str)
        (self._out / f"{self._section}.json").write_text(text, encoding="utf-8")


def markdown(section: str, rows: list[dict[str, Any]]) -> str:
    """Formats the rows of a section as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "name"))
    lines = ["", "| " + " | ".join([section, *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        cells = [str(row["name"])]
        for column in columns:
            value = row.get(column, "")
            cells.append(f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "/"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def environment() -> dict[str, Any]:
    import lightning
    import torch

    import lmlight

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    cuda = torch.version.cuda
    versions = {"torch": torch.__version__, "cuda": cuda, "lightning": lightning.__version__}
    return {"device": device, **versions, "lmlight": lmlight.__version__, "python": sys.version.split()[0]}


class Bench:
    """Shared by all sections: options, temporary folders, and the `lmlight` command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.tiny: bool = options.tiny
        self.corpus: Path = options.work / "input.txt"
        self.work: Path = options.work

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    @property
    def accelerator(self) -> str:
        return "gpu" if self.device == "cuda" else self.device

    def small(self) -> list[str]:
        """Flags that shrink any network and batch."""
        sizes = {"data.block_size": 16, "data.batch_size": 4, "data.tokenizer.vocab_size": 400}
        sizes |= {"model.net.n_layer": 1, "model.net.n_head": 2, "model.net.n_embd": 32}
        return [f"--{name}={value}" for name, value in sizes.items()] if self.tiny else []

    def command(self, *words: str) -> tuple[str, str, int]:
        """Runs `lmlight WORDS` in this process; returns its output, its errors and its exit status."""
        from lmlight.training.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(words))
        print(out.getvalue(), err.getvalue(), flush=True)
        return out.getvalue(), err.getvalue(), status

    def fit_words(self, name: str, *flags: str, accelerator: str = "") -> list[str]:
        where = [f"--trainer.default_root_dir={self.work / 'runs' / name}", "--trainer.enable_progress_bar=false"]
        where += [f"--trainer.accelerator={accelerator or self.accelerator}", "--trainer.devices=1"]
        return ["fit", f"--data.corpus={self.corpus}", *where, *flags]

    def fit(self, name: str, *flags: str, accelerator: str = "") -> Path:
        """Trains and returns the folder of the run."""
        _, err, status = self.command(*self.fit_words(name, *flags, accelerator=accelerator))
        if status:
            raise RuntimeError(err.strip() or f"exit status {status}")
        return self.run_folder(name)

    def run_folder(self, name: str) -> Path:
        (folder,) = (self.work / "runs" / name).iterdir()
        return folder

    def synchronize(self) -> None:
        import torch

        if self.device != "cpu":
            torch.get_device_module(self.device).synchronize()

    def seconds(self, task: Callable[[], Any], warmup: int, repeats: int) -> float:
        """The median time of a task on the device."""
        times = []
        for _ in range(warmup + repeats):
            self.synchronize()
            began = time.perf_counter()
            task()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[warmup:])


# correct


class KillAt(Callback):
    """Kills its process at the step that an environment variable names."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if str(trainer.global_step) == os.environ.get(KILL_AT):
            os.kill(os.getpid(), signal.SIGKILL)


def correct(bench: Bench, report: Report) -> None:
    import torch

    from lmlight import LanguageModel, checkpoint
    from lmlight.commands import chat, curves

    steps, every = bench.pick((60, 20), (6, 3))
    # a constant schedule lets a killed run continue for longer
    common = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={every}", *bench.small()]
    common += [
        "--model.schedule.shape=constant",
        "--model.schedule.warmup_steps=5",
        f"--trainer.log_every_n_steps={every}",
    ]
    losses = {}

    def losses_of(run: Path) -> list[float]:
        rows = curves.read(run, "step")
        return [
            value
            for row in rows
            for name in ("train/loss", "val/nats_per_char")
            if (value := row.get(name)) is not None
        ]

    def compare(name: str, limit: float, *flags: str, to: str = "cpu", accelerator: str = "") -> dict[str, Any]:
        """Trains and compares all losses with those of an earlier run."""
        watching = [] if name == "float32" else [CURVE_ALONE]
        run = bench.fit(name, *watching, *common, *flags, accelerator=accelerator)
        losses[name] = losses_of(run)
        return {"final": losses[name][-1]} if name == to else difference(losses[name], to, limit)

    def difference(found: list[float], to: str, limit: float) -> dict[str, Any]:
        apart = max(abs(a - b) for a, b in zip(found, losses[to], strict=True))
        assert apart <= limit, f"losses differ by {apart:.3g} from {to}'s, more than {limit}"
        return {"final": found[-1], "difference": apart, "limit": limit, "from": to}

    def last(name: str) -> Path:
        return bench.run_folder(name) / "checkpoints" / "last.ckpt"

    def resume() -> dict[str, Any]:
        """Compares a killed and resumed run with an uninterrupted one."""
        at = every + every // 2
        words = bench.fit_words("killed", CURVE_ALONE, *common, "--trainer.callbacks+=gpu.KillAt")
        killed = child(bench, ["-m", "lmlight", *words], {KILL_AT: str(at)})
        assert killed == -signal.SIGKILL, f"exit status {killed} instead of SIGKILL"
        assert checkpoint.read(last("killed"))["global_step"] == every
        run = bench.fit("killed", f"--ckpt_path={last('killed')}")
        weights = [checkpoint.weights_of(checkpoint.read(last(name))) for name in ("killed", "float32")]
        apart = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
        return {**difference(losses_of(run), "float32", 5e-3), "weights differ by": apart}

    def nats(*words: str) -> float:
        out, err, status = bench.command("validate", f"--data.corpus={bench.corpus}", *words)
        assert status == 0, err
        return float(next(line.split()[1] for line in out.splitlines() if line.startswith("val/nats_per_char")))

    def validate() -> dict[str, Any]:
        found = {
            kind: nats(f"--ckpt_path={last('float32')}", f"--trainer.accelerator={kind}")
            for kind in {"cpu", bench.accelerator}
        }
        apart = max(found.values()) - min(found.values())
        assert apart <= 1e-4, f"validation differs by {apart:.3g} between {' and '.join(found)}"
        return {"final": found[bench.accelerator], "difference": apart, "limit": 1e-4}

    def predict() -> dict[str, Any]:
        words = [
            "predict",
            f"--ckpt_path={last('float32')}",
            f"--trainer.accelerator={bench.accelerator}",
            '--data.prompts=["ROMEO:", ""]',
        ]
        texts = [bench.command(*words, "--model.sampling.max_new_tokens=30") for _ in range(2)]
        assert texts[0] == texts[1] and texts[0][2] == 0, "the same seed gave two texts"
        with contextlib.redirect_stdout(io.StringIO()) as out, feeding("ROMEO:\n/quit\n"):
            chat.main([str(last("float32")), f"--device={bench.device}"])
        assert "ROMEO:" in out.getvalue()
        return {}

    def greedy() -> dict[str, Any]:
        models = {kind: LanguageModel.load_from_checkpoint(last("float32"), kind) for kind in {"cpu", bench.device}}
        ids = torch.tensor(
            [models["cpu"].tokenizer.encode(bench.corpus.read_text("utf-8")[:2000])[: models["cpu"].net.block_size]]
        )
        with torch.inference_mode():
            logits = [model(ids.to(kind)).cpu() for kind, model in models.items()]
        apart = float((logits[0] - logits[-1]).abs().max() / logits[0].abs().max())
        texts = {
            model.generate("ROMEO:", max_new_tokens=bench.pick(200, 20), temperature=0) for model in models.values()
        }
        assert apart <= 1e-4, f"logits differ by {apart:.3g} of the largest"
        assert len(texts) == 1, f"greedy texts differ: {texts}"
        return {"difference": apart, "limit": 1e-4}

    def to_cpu_and_back() -> dict[str, Any]:
        shutil.copytree(bench.work / "runs" / "float32", bench.work / "runs" / "moved")
        for kind, more in (("cpu", 2), (bench.accelerator, 4)):
            words = [
                f"--ckpt_path={last('moved')}",
                f"--trainer.default_root_dir={bench.work / 'runs' / 'moved'}",
                f"--trainer.max_steps={steps + more}",
                f"--trainer.accelerator={kind}",
            ]
            _, err, status = bench.command("fit", *words)
            assert status == 0, err
            assert checkpoint.read(last("moved"))["global_step"] == steps + more
        return {}

    def not_finite() -> dict[str, Any]:
        words = bench.fit_words(
            "diverged", CURVE_ALONE, *common, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30"
        )
        _, err, status = bench.command(*words, "--trainer.gradient_clip_val=null")
        assert status == 2 and "not a finite number" in err, (status, err)
        return {}

    def watched() -> dict[str, Any]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(bench.run_folder("float32"))).Reload()
        scalars = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        assert events.Tags()["images"] and "throughput/tokens_per_second" in scalars, events.Tags()
        return {
            tag.removeprefix("throughput/"): value for tag, value in scalars.items() if tag.startswith("throughput/")
        }

    def strategy(name: str, *flags: str) -> dict[str, Any]:
        words = bench.fit_words(name, CURVE_ALONE, *common, *flags)
        status = child(bench, ["-m", "lmlight", *words])
        assert status == 0, f"exit status {status}"
        return difference(losses_of(bench.run_folder(name)), "float32", 0.02)

    # Muon's iteration runs in bfloat16 on CUDA and float32 products in TF32, so losses agree to a hundredth
    report.measure("cpu", partial(compare, "cpu", 0, accelerator="cpu"))
    report.measure("float32", partial(compare, "float32", 0.02))
    report.measure("bf16-mixed", partial(compare, "bf16-mixed", 0.03, "--trainer.precision=bf16-mixed"))
    report.measure("validate", validate)
    report.measure("greedy text and logits", greedy)
    report.measure("resume after SIGKILL", resume)
    report.measure("predict and chat", predict)
    report.measure("callbacks", watched)
    report.measure("a non-finite loss stops the run", not_finite)
    compiled = partial(compare, "compiled", 0.02, "--model.compile_net=true", to="float32")
    report.measure("compile_net", compiled)
    halves = ["--trainer.accumulate_grad_batches=2", f"--trainer.val_check_interval={2 * every}"]
    report.measure("accumulation", partial(compare, "accumulated", 0.02, *halves, to="float32"))
    subwords = "--data.subword_sampling.alpha=0.3"
    report.measure("subword sampling", partial(compare, "subwords", 1, subwords, to="float32"))
    report.measure("… with workers", partial(compare, "workers", 5e-3, subwords, "--data.num_workers=2", to="subwords"))
    report.measure("16-mixed", partial(compare, "16-mixed", 0.05, "--trainer.precision=16-mixed", to="float32"))
    report.measure("a CUDA checkpoint to the CPU and back", to_cpu_and_back)
    report.measure("DDP, one process", partial(strategy, "ddp", "--trainer.strategy=ddp"))
    sharded = [
        f"--config={ROOT / 'configs' / 'fsdp.yaml'}",
        "--trainer.strategy.data_parallel_size=1",
        "--trainer.devices=1",
    ]
    report.measure("FSDP, one process", partial(strategy, "fsdp", *sharded))


def child(bench: Bench, words: list[str], variables: dict[str, str] | None = None) -> int:
    """Runs Python in a child process; returns its exit status."""
    variables = {**os.environ, "PYTHONPATH": search_path(), **(variables or {})}
    return subprocess.run([sys.executable, *words], env=variables, cwd=bench.work).returncode


@contextlib.contextmanager
def feeding(text: str) -> Any:
    """Makes `input` read this text."""
    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = before


# record


def record(bench: Bench, report: Report) -> None:
    from lmlight.commands import curves

    few = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.precision=32"]
    small = bench.pick([], [*bench.small(), *few])
    folders: list[Path] = []

    def run(name: str, config: str, seed: int, every: int, *flags: str) -> dict[str, Any]:
        words = [f"--config={ROOT / 'configs' / config}", f"--trainer.val_check_interval={every}", *flags, *small]
        folders.append(bench.fit(name, *words, f"--seed_everything={seed}"))
        rows = curves.read(folders[-1], "step")
        scores = [float(row["val/nats_per_char"] or "nan") for row in rows]
        first = next((row["seconds"] for row, score in zip(rows, scores) if score <= NANOGPT_NATS), None)
        found = {"final nats/char": scores[-1], "best": min(scores), "training seconds": rows[-1]["seconds"]}
        return {**found, f"seconds until {NANOGPT_NATS}": first if first is not None else "not reached"}

    report.measure(
        "default, 600 steps", partial(run, "default", "shakespeare.yaml", 1337, 50, "--trainer.max_steps=600")
    )
    folders.clear()
    for seed in bench.pick((1337, 1, 2), (1337, 1)):
        report.measure(f"seed {seed}", partial(run, f"seed {seed}", "shakespeare-gpu.yaml", seed, 130))
    finals = [row["final nats/char"] for row in report.rows[1:] if "error" not in row]
    report.measure("mean", lambda: {"final nats/char": statistics.mean(finals)})
    teachers = ["--model=lmlight.DistilledModel", f"--model.teachers={json.dumps(list(map(str, folders)))}"]
    # teachers prevent overfitting too, see configs/shakespeare-best.yaml
    teachers += ["--model.net.dropout=0", "--model.optimizer.weight_decay=0.7"]
    report.measure("with these as teachers", partial(run, "distilled", "shakespeare-gpu.yaml", 3, 130, *teachers))


# throughput


def throughput(bench: Bench, report: Report) -> None:
    import peers
    import torch
    from lightning.pytorch import Callback, Trainer

    from lmlight import LanguageModel, TextDataModule, Transformer
    from lmlight.data.tokenizer import TokenizerConfig
    from lmlight.models import GPT2
    from lmlight.training import callbacks
    from lmlight.training.callbacks import RunLogger
    from lmlight.training.checkpointing import BestLastCheckpoint

    shape = bench.pick(peers.Shape(50257, 1024, 12, 12, 768), peers.Shape(400, 16, 1, 2, 32))
    batch, steps, warmup = bench.pick((32, 50, 12), (2, 4, 2))
    tokens = batch * shape.block_size
    adamw = partial(torch.optim.AdamW, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    idx = torch.randint(shape.vocab_size, (batch, shape.block_size + 1), device=bench.device)
    inputs, targets = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    rate = 0.0
    milliseconds: dict[str, float] = {}

    def matrix_rate() -> dict[str, Any]:
        nonlocal rate
        size, dtype = bench.pick((8192, torch.bfloat16), (256, torch.float32))
        a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        rate = 2 * size**3 / bench.seconds(lambda: a @ b, warmup=3, repeats=10)
        return {"TFLOP/s": rate / 1e12}

    flops = 3 * Transformer(**vars(shape), **GPT2).flops_per_token()

    def row(name: str, seconds: float, first: str = "") -> dict[str, Any]:
        milliseconds[name] = 1e3 * seconds
        found = {
            "ms per step": 1e3 * seconds,
            "tokens/s": tokens / seconds,
            "matmul utilization": flops * tokens / seconds / rate,
        }
        if first in milliseconds:
            found[f"relative to {first}"] = milliseconds[name] / milliseconds[first]
        if bench.device == "cuda":
            found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return found

    def bare(name: str, make: Callable[..., Any], compiled: bool, first: str = "") -> dict[str, Any]:
        """Trains a network in a minimal loop."""
        torch.manual_seed(0)
        net, loss_of = make(shape)
        net.to(bench.device).train()
        optimizer = adamw(net.parameters())
        if compiled:
            loss_of = torch.compile(loss_of)

        def step() -> None:
            with torch.autocast(bench.device, torch.bfloat16):
                loss = loss_of(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(warmup):
            step()
        bench.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        bench.synchronize()
        return row(name, (time.perf_counter() - began) / steps, first)

    def ours(shape: Any) -> tuple[Any, Callable[..., Any]]:
        net = Transformer(**vars(shape), **GPT2)
        return net, net.loss

    class Times(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in (warmup, warmup + steps):
                bench.synchronize()
                setattr(self, "began" if trainer.global_step == warmup else "ended", time.perf_counter())

    def fit(name: str, compiled: bool, first: str) -> dict[str, Any]:
        """The same network and batch in `fit` with all callbacks, without validation."""
        data = TextDataModule(
            str(bench.corpus), shape.block_size, batch, tokenizer=TokenizerConfig("unigram", bench.pick(4096, 400))
        )
        times = Times()
        trainer = Trainer(
            accelerator=bench.accelerator,
            devices=1,
            precision="bf16-mixed",
            max_steps=warmup + steps + 1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            log_every_n_steps=50,  # as in configs/gpt2-124m.yaml
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            logger=RunLogger(str(bench.work / "runs" / name)),
            callbacks=[times, *(kind() for kind in callbacks.DEFAULT), BestLastCheckpoint()],
        )
        # its size does not depend on the tokenizer
        model = LanguageModel(lambda *_: ours(shape)[0], adamw, compile_net=compiled, check_causality=False)
        trainer.fit(model, datamodule=data)
        found = row(name, (times.ended - times.began) / steps, first)
        waiting = trainer.callback_metrics.get("throughput/waiting_for_data")
        return {**found, "waiting for data": float("nan") if waiting is None else float(waiting)}

    report.measure("bf16 matrix product", matrix_rate)
    report.measure("bare loop", partial(bare, "bare loop", ours, False))
    report.measure("fit", partial(fit, "fit", False, "bare loop"))
    report.measure("nanoGPT's net", partial(bare, "nanoGPT's net", peers.nanogpt, False, "bare loop"))
    report.measure("bare loop, compiled", partial(bare, "bare loop, compiled", ours, True))
    report.measure("fit, compiled", partial(fit, "fit, compiled", True, "bare loop, compiled"))
    report.measure(
        "nanoGPT's net, compiled", partial(bare, "nanoGPT's net, compiled", peers.nanogpt, True, "bare loop, compiled")
    )


# generation


def generation(bench: Bench, report: Report) -> None:
    import peers
    import torch
    from generation import seconds_of

    from lmlight import Sampling, Transformer
    from lmlight.generation import generate
    from lmlight.models import GPT2

    shapes = bench.pick(
        {"6 × 384": peers.Shape(65, 256, 6, 6, 384), "124M": peers.Shape(50257, 1024, 12, 12, 768)},
        {"1 × 32": peers.Shape(65, 32, 1, 2, 32)},
    )
    prompt, new, rounds = bench.pick((56, 200, 3), (4, 8, 1))

    def read_rate() -> float:
        """Bytes per second of reading a large array."""
        array = torch.ones(bench.pick(2**29, 2**20), device=bench.device)
        return array.nbytes / bench.seconds(array.sum, warmup=0, repeats=5)

    def run(shape: peers.Shape, streams: int, rate: float) -> dict[str, Any]:
        net = Transformer(**vars(shape), **GPT2).to(bench.device).eval()
        theirs = peers.hf_gpt2(shape)[0].to(bench.device).eval()
        idx = torch.randint(shape.vocab_size, (streams, prompt), device=bench.device)
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
        tasks = {
            "lmlight": lambda: generate(net, idx, Sampling(max_new_tokens=new, temperature=1, min_p=None)),
            "transformers": lambda: theirs.generate(idx, attention_mask=torch.ones_like(idx), **options),
        }

        def waited_for(task: Callable[[], Any]) -> None:
            task()
            bench.synchronize()

        with torch.inference_mode():
            medians = seconds_of(rounds, {name: partial(waited_for, task) for name, task in tasks.items()})
        ours, other = (medians[name] / new for name in tasks)
        weights = sum(module.weight.nbytes for module in net.modules() if isinstance(module, torch.nn.Linear))
        return {
            "ms per token": 1e3 * ours,
            "tokens/s": streams / ours,
            "transformers, ms": 1e3 * other,
            "speedup": other / ours,
            "relative to reading the weights": ours / (weights / rate),
        }

    rate = read_rate()
    for name, shape in shapes.items():
        for streams in bench.pick((1, 32), (1, 2)):
            report.measure(f"{name}, {streams} streams", partial(run, shape, streams, rate))


SECTIONS = {"correct": correct, "record": record, "throughput": throughput, "generation": generation}


# command line


def fetch(folder: Path) -> None:
    """Downloads the files for a GPU machine without network."""
    import peers

    from lmlight.data import download

    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *WHEELS, peers.NANOGPT]
    subprocess.run(command, check=True)
    shutil.copyfile(download.fetch("tinyshakespeare"), folder / "input.txt")
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"Copy {folder} to the GPU machine and pass it as --files: {names}")


def unpack(files: Path, work: Path) -> None:
    """Copies the corpus, and unpacks wheels of packages that are not installed."""
    if not (files / "input.txt").is_file():
        sys.exit(
            f"gpu.py: error: '{files / 'input.txt'}' is missing: run `gpu.py --fetch {files}` on a machine with a network"
        )
    shutil.copyfile(files / "input.txt", work / "input.txt")
    for wheel in sorted(files.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            importlib.metadata.distribution(name)
            continue
        except importlib.metadata.PackageNotFoundError:
            pass
        # peers.py expects nanoGPT in the cache
        peer = name == "lightning_gpt"
        target = work / "cache" / "peers" / f"lightning-gpt=={version}" if peer else work / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.append(str(work / "site"))
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"gpu.py: error: not installed: {', '.join(missing)}; copy their wheels to '{files}'")


def search_path() -> str:
    """PYTHONPATH for child processes."""
    return os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, sys.path)])


def run_sections(options: argparse.Namespace) -> int:
    """Runs each section in its own process. Returns the number of failed sections."""
    options.out.mkdir(parents=True, exist_ok=True)
    report, failed = options.out / "report.md", 0
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        unpack(options.files, work)
        report.write_text(f"# {json.dumps(environment())}\n", encoding="utf-8")
        sections = [name for name in SECTIONS if name in options.sections]
        for number, name in enumerate(sections):
            left = max(0.0, deadline - time.monotonic())
            limit = left * SHARES[name] / sum(SHARES[later] for later in sections[number:])
            words = [__file__, "--section", name, "--out", str(options.out.resolve()), "--work", str(work)]
            words += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
            variables = {
                **os.environ,
                "PYTHONPATH": search_path(),
                "LMLIGHT_CACHE": str(work / "cache"),
                "HF_HUB_OFFLINE": "1",
            }
            began = time.monotonic()
            with (options.out / "log.txt").open("a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    env=variables,
                    stdout=log,
                    stderr=log,
                    start_new_session=os.name == "posix",
                )
                try:
                    ended = f"exit status {process.wait(limit)}"
                except subprocess.TimeoutExpired:
                    ended = f"stopped at its limit of {limit:.0f} s"
                finally:  # also if this process is stopped: a section left behind would disturb the next measurement
                    stop(process)
            found = options.out / f"{name}.json"
            rows = json.loads(found.read_text("utf-8"))["rows"] if found.exists() else []
            errors = sum("error" in row for row in rows)
            failed += errors > 0 or ended != "exit status 0"
            line = f"{name}: {ended}, {time.monotonic() - began:.0f} s, {len(rows)} rows, {errors} errors"
            with report.open("a", encoding="utf-8") as file:
                file.write(markdown(name, rows) + f"\n{line}\n")
            print(line, flush=True)
    print(report.read_text("utf-8"))
    return failed


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills a section, if it still runs, and its child processes."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", type=Path, metavar="FILES", help="download what the GPU machine needs, and exit")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for the results")
    parser.add_argument("--files", type=Path, default=Path("gpu-files"), help="folder filled by --fetch")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9, help="time limit of all sections together")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to test the script")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # run by the script itself
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fetch:
        fetch(options.fetch)
        return 0
    if options.section:
        SECTIONS[options.section](Bench(options), Report(options.out, options.section))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return min(run_sections(options), 1)


if __name__ == "__main__":
    sys.exit(main())
