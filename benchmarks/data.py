"""Speed and memory of tokenization, and of training on texts of different sizes.

python benchmarks/data.py make text.txt --megabytes 2000     # generates a text; the same for the same seed
python benchmarks/data.py prepare text.txt                   # time and peak resident memory of each stage
python benchmarks/data.py train small.txt text.txt           # milliseconds per step on each text, alternating
python benchmarks/data.py read text.txt                      # resident memory while windows are read in random order
python benchmarks/data.py resegment text.txt                 # sampled segmentations, shard by shard
python benchmarks/data.py peers text.txt --megabytes 50      # encoding, against other libraries with the same vocabulary
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

WORDS = 200_000


def vocabulary(random: np.random.Generator) -> list[str]:
    """Words of one to five syllables, most frequent first. Frequent words are short, as in natural language."""
    onsets = "b br c ch cl d dr f fl g gr h j k l m n p pl qu r s sh sl st t th tr v w y z".split()  # noqa: SIM905  (a list is harder to read)
    vowels = "a ai e ea ee i ie o oa oo ou u".split()  # noqa: SIM905  (a list is harder to read)
    codas = ["", "", "", "", *"ck d ght l ll m n nd ng nt p r rd rk rn s ss st t th".split()]  # noqa: SIM905  (a list is harder to read)
    words: dict[str, None] = {}
    while len(words) < WORDS:
        longest = 1 + min(4, len(words) * 5 // WORDS + (len(words) > 200))
        syllables = random.integers(1, longest + 1)
        word = "".join(random.choice(onsets) + random.choice(vowels) + random.choice(codas) for _ in range(syllables))
        words.setdefault(word)
    return list(words)


def make(path: Path, megabytes: int, seed: int) -> None:
    """Writes a text with Zipf-Mandelbrot word frequencies, and sentences and paragraphs of varying length."""
    random = np.random.default_rng(seed)
    words = vocabulary(random)
    cumulative = np.cumsum(1 / (np.arange(WORDS) + 2.7))
    cumulative /= cumulative[-1]
    behind = [" ", ", ", ". ", "? ", ".\n"]
    odds = np.cumsum([0.86, 0.06, 0.05, 0.01, 0.02])
    table = np.array([word + after for after in behind for word in words], dtype=object)
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        while written < megabytes * 1_000_000:
            word = np.searchsorted(cumulative, random.random(200_000))
            after = np.searchsorted(odds, random.random(200_000))
            written += file.write("".join(table[after * WORDS + word].tolist()))


class Peak:
    """Measures peak resident memory inside a `with` block.

    Attributes:
        own: bytes of this process, above its memory at the start.
        all: bytes of this process and its children.
    """

    def __enter__(self) -> Peak:
        self._process, self._done = psutil.Process(), threading.Event()
        self._base, self.own, self.all = self._process.memory_info().rss, 0, 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            own = self._process.memory_info().rss
            others = 0
            for child in self._process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    others += child.memory_info().rss
            self.own, self.all = max(self.own, own - self._base), max(self.all, own + others)


def prepare(path: Path, cache: str) -> None:
    from lmlight import TextDataModule
    from lmlight.data import corpus
    from lmlight.data.token_writer import write_store
    from lmlight.data.tokenizer import TokenizerConfig
    from lmlight.data.workers import cpu_count

    began = time.perf_counter()

    def report(stage: str, megabytes: float | None = None) -> None:
        nonlocal began
        seconds = time.perf_counter() - began
        speed = f"{megabytes / seconds:10,.1f} MB/s" if megabytes else ""
        print(
            f"  {stage:<28}{seconds:8.1f} s{speed}  {peak.own / 1e6:8,.0f} MB more, {peak.all / 1e6:,.0f} MB in total",
            flush=True,
        )
        began = time.perf_counter()

    with Peak() as peak:
        text = corpus.load(str(path))
        chars, size = text.n_chars, path.stat().st_size
        print(f"{path}: {size / 1e6:,.0f} MB, {cpu_count()} cores")
        report("hashed and counted", size / 1e6)
        cut = corpus.train_chars(chars, 0.1)
        tokenizer = TokenizerConfig().train((chunk.text for chunk in text.chunks(0, cut)), cut)
        report("tokenizer trained")
        parts = {"train": text.chunks(0, cut), "val": text.chunks(cut)}
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            write_store(Path(folder) / "store", "print", parts, tokenizer, chars=chars)
            report("encoded", size / 1e6)
        data = TextDataModule(str(path), cache=cache)
        data.prepare_data()
        data.setup("fit")
        report("all stages, by TextDataModule", size / 1e6)
        data.prepare_data()
        report("again, from the cache", size / 1e6)
        for number, _ in enumerate(data.train_dataloader()):
            if number == 20_000:
                break
        report(f"{number:,} batches read")


def train(paths: list[Path], cache: str, steps: int, rounds: int) -> None:
    import lightning.pytorch as pl

    from lmlight import LanguageModel, TextDataModule

    warnings.simplefilter("ignore")
    seconds: dict[Path, list[float]] = {path: [] for path in paths}

    class Clock(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 10:  # the first steps are slower
                self.began = time.perf_counter()
            elif trainer.global_step == 10 + steps:
                self.seconds = (time.perf_counter() - self.began) / steps

    for _ in range(rounds):
        for path in paths:
            clock = Clock()
            trainer = pl.Trainer(
                max_steps=10 + steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, callbacks=[clock], limit_val_batches=0, use_distributed_sampler=False,
            )  # fmt: skip
            with Peak() as peak:
                trainer.fit(LanguageModel(), datamodule=TextDataModule(str(path), cache=cache))
            seconds[path].append(clock.seconds)
            print(f"  {path.name:<20}{1e3 * clock.seconds:8.1f} ms a step, {peak.own / 1e6:,.0f} MB more", flush=True)
    for name, of in {"best": min, "median": statistics.median}.items():
        for path in paths:
            figure = of(seconds[path])
            print(
                f"{path.name:<20} {name:<7}{1e3 * figure:8.1f} ms a step, {figure / of(seconds[paths[0]]):.3f} of the first"
            )
    ratios = [other / first for first, other in zip(seconds[paths[0]], seconds[paths[-1]])]
    print(
        f"{paths[-1].name} to {paths[0].name}, round by round: median {statistics.median(ratios):.3f}, {sorted(ratios)}"
    )


def read(path: Path, cache: str, batches: int) -> None:
    """Reads windows in the order of an epoch and prints resident memory."""
    from lmlight import TextDataModule

    data = TextDataModule(str(path), cache=cache)
    data.prepare_data()
    data.setup("fit")
    process, began = psutil.Process(), time.perf_counter()
    ids = data.store.ids["train"]
    loader = data.train_dataloader()
    pages = len(ids) * ids.dtype.itemsize / 4096
    windows = batches * data.batch_size
    print(
        f"{len(ids):,} tokens in {len(ids.shards)} shards, {pages:,.0f} pages; "
        f"{windows:,} windows of {len(loader) * data.batch_size:,}"
    )
    for number, _ in enumerate(loader):
        if number % (batches // 10) == 0:
            memory = process.memory_info()
            print(
                f"  {number:9,} batches{time.perf_counter() - began:8.1f} s   resident {memory.rss / 1e6:6,.0f} MB, "
                f"including mapped files {memory.shared / 1e6:6,.0f} MB",
                flush=True,
            )
        if number == batches:
            break


def resegment(path: Path, cache: str, shards: int) -> None:
    """Resegments shards of a text in this process, and in one process per core."""
    from lmlight import TextDataModule
    from lmlight.data.subword_regularization import SubwordSampling
    from lmlight.data.workers import cpu_count

    data = TextDataModule(str(path), cache=cache)
    data.prepare_data()
    data.setup("fit")
    counts = data.tokenizer.char_counts
    for workers in (0, cpu_count()):
        data = TextDataModule(str(path), cache=cache, subword_sampling=SubwordSampling(), num_workers=workers)
        with Peak() as peak:
            data.prepare_data()
            data.setup("fit")
            began, characters = time.perf_counter(), 0
            for shard in range(shards):
                data._source._open([(0, coming) for coming in range(shard, min(shard + 1 + workers, shards))])
                characters += int(counts[data._source._ids].sum())
            seconds = time.perf_counter() - began
            data.teardown("fit")
        print(
            f"  {shards} shards, {workers} worker processes: {characters / 1e6 / seconds:6.2f} M characters "
            f"a second, {peak.own / 1e6:,.0f} MB more, {peak.all / 1e6:,.0f} MB in total",
            flush=True,
        )


def peers(path: Path, megabytes: int, rounds: int) -> None:
    from lmlight.data import corpus
    from lmlight.data.token_writer import write_store
    from lmlight.data.tokenizer import SentencePieceTokenizer, TokenizerConfig
    from lmlight.data.workers import cpu_count

    cores = cpu_count()
    with path.open("rb") as file:
        text = file.read(megabytes * 1_000_000).decode("utf-8", "ignore")
    pieces = list(corpus.load(str(path)).chunks(0, len(text)))
    tokenizer = TokenizerConfig().train(text, len(text))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor = tokenizer._processor
    lines = text.split("\n")

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder) / "store", "print", {"train": iter(pieces)}, tokenizer)

    encoders: dict[str, Callable[[], Any]] = {
        f"lmlight, verified and written to disk, {cores} processes": ours,
        "SentencePiece's batch encoder, 1 thread": lambda: processor.encode(lines),
        f"SentencePiece's batch encoder, {cores} threads": lambda: processor.encode(lines, num_threads=cores),
    }
    from tokenizers import Tokenizer

    from lmlight.export.tokenizer import tokenizer_json

    exported = json.dumps(tokenizer_json(tokenizer))
    other = Tokenizer.from_str(exported)
    encoders["Hugging Face tokenizers, unigram, all cores"] = lambda: other.encode_batch_fast(lines)
    work = Path(tempfile.mkdtemp(prefix="lmlight-benchmark-"))
    (work / "tokenizer.json").write_text(exported, "utf-8")
    # litgpt puts a BOS token before each file
    (work / "generation_config.json").write_text(json.dumps({"bos_token_id": processor.unk_id()}))
    files = []
    for number, piece in enumerate(pieces):  # about a megabyte each: litgpt encodes whole files
        files.append(str(work / f"{number}.txt"))
        Path(files[-1]).write_text(piece.text, "utf-8", newline="")

    def litgpt() -> None:
        import litdata

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            litdata.optimize(
                partial(litgpt_tokenize, folder=str(work)), files, folder + "/train", num_workers=cores,
                chunk_bytes="50MB", item_loader=litdata.TokensLoader(), verbose=False,
            )  # fmt: skip

    encoders[f"litgpt's TextFiles, the same tokenizer.json, {cores} workers"] = litgpt
    same = different = 0
    for mine, theirs in zip(processor.encode(lines), other.encode_batch_fast(lines)):
        same += len(mine) * (mine == theirs.ids)
        different += len(mine) * (mine != theirs.ids)
    print(
        f"Hugging Face: {different / (same + different):.2e} of the ids are in lines that lmlight encodes differently"
    )
    print(f"{len(text) / 1e6:,.0f} MB of {path.name}, vocabulary {tokenizer.vocab_size:,}")
    best = dict.fromkeys(encoders, float("inf"))
    for _ in range(rounds):
        for name, encode in encoders.items():
            began = time.perf_counter()
            encode()
            best[name] = min(best[name], time.perf_counter() - began)
    shutil.rmtree(work)
    for name, took in best.items():
        print(f"  {name:<60}{len(text) / 1e6 / took:8.1f} MB/s", flush=True)


def litgpt_tokenize(filename: str, folder: str) -> Iterator[Any]:
    """Encodes a file with litgpt, in a worker process of litdata."""
    text_files, tokenizer = _litgpt(folder)
    yield from text_files.tokenize(filename, tokenizer)


@lru_cache
def _litgpt(folder: str) -> tuple[Any, Any]:
    import peers

    peers._without_init("litgpt", peers.fetched(peers.LITGPT) / "litgpt")
    tokenizers = importlib.import_module("litgpt.tokenizer")
    return importlib.import_module("litgpt.data.text_files"), tokenizers.Tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="generate a text")
    making.add_argument("path", type=Path)
    making.add_argument("--megabytes", type=int, default=2000)
    making.add_argument("--seed", type=int, default=1337)
    preparing = commands.add_parser("prepare", help="measure preparation")
    preparing.add_argument("path", type=Path)
    training = commands.add_parser("train", help="measure training on texts of several sizes")
    training.add_argument("paths", type=Path, nargs="+")
    training.add_argument("--steps", type=int, default=60)
    training.add_argument("--rounds", type=int, default=5)
    reading = commands.add_parser("read", help="measure memory while windows are read in random order")
    reading.add_argument("path", type=Path)
    reading.add_argument("--batches", type=int, default=200_000)
    segmenting = commands.add_parser("resegment", help="measure sampled segmentations")
    segmenting.add_argument("path", type=Path)
    segmenting.add_argument("--shards", type=int, default=4)
    peering = commands.add_parser("peers", help="compare encoding")
    peering.add_argument("path", type=Path)
    peering.add_argument("--megabytes", type=int, default=50)
    peering.add_argument("--rounds", type=int, default=3)
    for command in (preparing, training, reading, segmenting):
        command.add_argument("--cache", help="folder for tokens (default: a temporary folder)")
    options = parser.parse_args()
    if options.command == "make":
        make(options.path, options.megabytes, options.seed)
    elif options.command == "peers":
        peers(options.path, options.megabytes, options.rounds)
    else:
        cache = options.cache or tempfile.mkdtemp(prefix="lmlight-benchmark-")
        try:
            if options.command == "prepare":
                prepare(options.path, cache)
            elif options.command == "read":
                read(options.path, cache, options.batches)
            elif options.command == "resegment":
                resegment(options.path, cache, options.shards)
            else:
                train(options.paths, cache, options.steps, options.rounds)
        finally:
            if not options.cache:
                shutil.rmtree(cache)


if __name__ == "__main__":
    main()
