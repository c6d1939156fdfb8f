"""TextDataModule: corpus, tokenizer, tokens and sampler, tied together for Lightning.

`prepare_data` (one process) leaves a token store in the cache (`preparing.py`); `setup` (every process) opens it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lmlight.data import streaming
from lmlight.data.download import BUILTIN_CORPORA
from lmlight.data.loader import Batch, ShardedWindows, StatefulTrainLoader, Windows, identity_collate
from lmlight.data.preparing import CorpusSpec
from lmlight.data.reading import TextFormat
from lmlight.data.resegment import Resegmenter, ShardedEpoch, windows_in_shards
from lmlight.data.subword_regularization import SubwordSampler, SubwordSampling
from lmlight.data.token_store import TokenArray, TokenStore, decode
from lmlight.data.tokenizer import CONTROL_CHARACTERS, Tokenizer, TokenizerConfig
from lmlight.data.windows import (
    EvalBatchSampler,
    TrainBatchSampler,
    epoch_starts,
    eval_windows,
    random_starts,
    windows_per_epoch,
)
from lmlight.errors import UserError

# A sample's prompt appears as a tag in TensorBoard and in the command that `fit` prints at its end.
SAMPLE_PROMPT_CHARS = 20
# Logits of an evaluation batch, at most: 1 GiB in float32. `batch_size` counts a whole optimizer step, which may be many
# micro-batches, and training does not hold all logits at once.
EVAL_LOGITS = 2**28
ZERO_WIDTH_JOINER = "\u200d"

# From so many characters on, what does not fit is made to fit; a shorter text is refused unless its settings suit it.
FEWEST_CHARS = 1000


class TextDataModule(LightningDataModule):
    """A text as token windows for training, validation and test, and prompts for prediction.

    The text is split by characters before the tokenizer is trained, on the training part alone. Validation windows do
    not overlap and score every token once; `test` reads the same text again with a sliding window as its second loader.

    Args:
        corpus: the text: the name of a corpus (`tinyshakespeare`), a file, a folder, a pattern (`books/**/*.txt`), or an
            address that fsspec opens (`https://`, `s3://`, `hf://`). Files are text, `.jsonl` or `.parquet`, packed as
            `.gz`, `.bz2`, `.xz` or `.zst` if they are called so. Or a text that `lmlight prepare` has prepared: the folder,
            or a copy of it at such an address.
        block_size: tokens in a window, which is also the longest context that the net sees; fewer where a text of 1,000
            characters or more has not so many.
        batch_size: windows in one optimizer step, over all devices and accumulated batches together.
        val_fraction: the share of the characters, from the end, that is kept for validation.
        val_corpus: another text to validate on, of whatever `corpus` may be; all of `corpus` is then for training.
        test_corpus: another text for `test`; null takes the validation text.
        field: of `.jsonl` and `.parquet` records, the one that is the text.
        separator: in text files, what stands between two documents, such as `<|endoftext|>`; null takes a file as one text.
        errors: bytes that are invalid in the encoding: `strict` refuses them, `replace` puts U+FFFD in their place.
        encoding: the encoding of text files and `.jsonl`: any text encoding that Python knows, such as `utf-16` or `cp1252`.
            `utf-8-sig` is UTF-8 without its byte order mark.
        cache: the folder for fetched texts and tokens; null is `$LMLIGHT_CACHE`, or the platform's own place for caches.
        tokenizer: which tokenizer to train; ignored where a checkpoint brings its own.
        subword_sampling: segment the training text afresh in each epoch; none if null. A text of more than one shard (eight
            million characters) is then seen shard by shard.
        windows: `epoch`: each epoch is a random permutation of windows that do not overlap; `random`: windows are drawn
            independently, as notebooks do.
        prompts: for `predict`: a list of texts, or the path of a file with one a line, `-` being the standard input. An
            empty one starts from nothing.
        prompt_batch_size: prompts that `predict` continues side by side; null is 1, or 32 where the texts go to a file.
        num_workers: processes that gather batches; 0 gathers them in the training process, which takes microseconds. With
            `subword_sampling` of a text of more than one shard, processes that segment the shards to come.
        seed: decides the order of the windows and the sampled segmentations.

    Raises:
        UserError: a size that is not positive; a `val_fraction` outside (0, 1); sampling without a unigram tokenizer; an
            empty separator; an unknown encoding.
    """

    def __init__(
        self,
        corpus: str = "tinyshakespeare",
        block_size: int = 64,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        val_corpus: str | None = None,
        test_corpus: str | None = None,
        field: str = "text",
        separator: str | None = None,
        errors: Literal["strict", "replace"] = "strict",
        encoding: str = "utf-8",
        cache: str | None = None,
        tokenizer: TokenizerConfig = TokenizerConfig(),
        subword_sampling: SubwordSampling | None = None,
        windows: Literal["epoch", "random"] = "epoch",
        prompts: list[str] | str = [""],  # noqa: B006  (never changed)
        prompt_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        sizes = {"block_size": block_size, "batch_size": batch_size, "prompt_batch_size": prompt_batch_size}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise UserError(f"data.num_workers must be 0 or more, got {num_workers}")
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}")
        if subword_sampling and tokenizer.kind != "unigram":
            raise UserError(
                f"subword_sampling draws by a unigram model's scores, which a {tokenizer.kind} tokenizer does not have: "
                "set --data.tokenizer.kind unigram, or --data.subword_sampling null"
            )
        corpora = {"corpus": corpus, "val_corpus": val_corpus, "test_corpus": test_corpus}
        for name, given in corpora.items():
            if not (isinstance(given, (str, os.PathLike)) or (given is None and name != "corpus")):
                raise UserError(f"data.{name} must be a path, a pattern, an address or a corpus's name, got {given!r}")
        corpus = os.fspath(corpus)
        val_corpus, test_corpus = (given and os.fspath(given) for given in (val_corpus, test_corpus))
        self.corpus, self.block_size, self.batch_size = corpus, block_size, batch_size
        reading = TextFormat(field, separator, errors, encoding)
        self._text = CorpusSpec(corpus, val_fraction, val_corpus, test_corpus, reading, tokenizer, cache)
        self.subword_sampling, self.windows, self.prompts = subword_sampling, windows, prompts
        self.prompt_batch_size, self.num_workers, self.seed = prompt_batch_size, num_workers, seed
        self._mistake = ""
        # of the prepared store: its folder and fingerprint, which one that the user names has no need of
        self._place: tuple[str, str | None] | None = None
        self._streamed: int | None = None  # tokens of a training text that is streamed
        self._given: Tokenizer | None = None
        self._sampler: SubwordSampler | None = None
        self._resegmenter: Resegmenter | None = None
        self._trained: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}  # as a LightningModule is pickled

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Encodes and decodes: set before `prepare_data` to use one from elsewhere, else known after `setup`."""
        return self._given or self._trained

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._given = tokenizer

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Fetches the corpus, trains the tokenizer and encodes the text, unless the cache has it all.

        Raises:
            UserError: see `corpus.load`, `Corpus.passages` and `TokenizerConfig.train`; the text is too short; the batch
                cannot be divided among the devices; the cache is not writable, or the disk is full.
        """
        if self._predicting():
            return
        try:
            self.prepare()
        except UserError as error:
            if self.trainer is None or self.trainer.world_size == 1:
                raise
            self._mistake = str(error)  # the other processes wait at a barrier: `setup` ends all of them alike

    def setup(self, stage: str) -> None:
        """Opens the prepared tokens."""
        if self._predicting():
            return
        if self.trainer is not None:
            mistake, self._place = self.trainer.strategy.broadcast((self._mistake, self._place))
            if mistake:
                raise UserError(mistake)
        place = self._place
        if place is None:
            raise UserError("call prepare_data() before setup(); a Trainer does both")
        store = TokenStore(Path(place[0]), place[1])
        self._trained, self._streamed = store.tokenizer, store.streamed
        tokenizer = store.tokenizer
        self._fit_to(store)
        self._train_ids, self._train_chars = store.ids["train"], store.chars["train"]
        self._train_counts = self._char_counts(self._train_ids, self._train_chars)
        before = self._train_ids[-1:]
        self._val_ids = store.ids["val"].before(before)
        self._val_counts = self._char_counts(store.ids["val"], store.chars["val"])
        self._test_ids, self._test_counts = self._val_ids, self._val_counts
        if "test" in store.ids:
            self._test_ids = store.ids["test"].before(before)
            self._test_counts = self._char_counts(store.ids["test"], store.chars["test"])
        if not tokenizer.lossless:
            rank_zero_warn(
                "this tokenizer is lossy (it folds newlines and spaces): figures per character are per character of the "
                "original text"
            )
        self._sampler = self._resegmenter = None
        if self.subword_sampling and stage == "fit":
            if len(self._train_ids.parts) == 1:
                self._sampler = SubwordSampler(tokenizer, decode(tokenizer, self._train_ids[:]), self.subword_sampling)
            else:
                self._resegmenter = Resegmenter(
                    self._train_ids, tokenizer, self.subword_sampling, self.seed, self.num_workers
                )

    def teardown(self, stage: str) -> None:
        if self._resegmenter is not None:
            self._resegmenter.close()

    def train_dataloader(self) -> StatefulTrainLoader | streaming.StreamedLoader:
        self._check_set_up()
        self._check_batch_size()
        if self._streamed:
            assert self._place is not None
            _, world_size, accumulate = self._share()
            return streaming.StreamedLoader(
                self.corpus if "://" in self.corpus else self._place[0],
                self.block_size,
                self.batch_size // (world_size * accumulate),
                accumulate,
                self._train_counts,
                self.seed,
                self.num_workers,
            )
        n_windows = self._windows_per_epoch()
        if self.subword_sampling and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            seen = self.trainer.max_steps * self.batch_size
            if 0 < seen < n_windows:
                rank_zero_warn(
                    f"this run sees {seen / n_windows:.0%} of the training text and none of it twice: subword_sampling "
                    "shows it in other pieces for nothing, set it to null"
                )
        order = TrainBatchSampler(n_windows, self.batch_size, *self._share())
        num_workers = 0 if self._resegmenter else self.num_workers
        return StatefulTrainLoader(self._train_windows, order, num_workers, self._train_ids.fingerprint)

    def val_dataloader(self) -> DataLoader[Batch]:
        self._check_set_up()
        return self._whole_loader(self._val_ids, self._val_counts, stride=self.block_size)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """The test text in windows that do not overlap, and in sliding ones."""
        self._check_set_up()
        return [
            self._whole_loader(self._test_ids, self._test_counts, stride)
            for stride in (self.block_size, -(-self.block_size // 2))
        ]

    def train_sample_dataloader(self, windows: int) -> DataLoader[Batch]:
        """Windows of the training text, spread evenly over it, to be scored exactly as the validation text is."""
        self._check_set_up()
        ids, T = self._train_ids, self.block_size
        starts = np.unique(np.linspace(0, len(ids) - 1 - T, windows).astype(np.int64) // T * T)
        plan = np.stack((starts, np.full_like(starts, T), np.zeros_like(starts)), axis=1)
        return self._scoring_loader(ids, self._train_counts, plan)

    @property
    def val_ids(self) -> TokenArray:
        """The validation text's tokens, behind the last one of the training text: on disk, so read slices of them."""
        self._check_set_up()
        return self._val_ids

    @property
    def sample_prompt(self) -> str:
        """A prompt for samples of text: a named corpus has its own; else the first whole line of the validation text, cut
        between words, or between characters if it has no spaces, to at most `SAMPLE_PROMPT_CHARS` characters."""
        if self.corpus in BUILTIN_CORPORA:
            return BUILTIN_CORPORA[self.corpus].sample_prompt
        self._check_set_up()
        assert self.tokenizer is not None
        beginning = self.tokenizer.decode(self._val_ids[1:129].tolist())
        # without control characters, for it is printed, and without what is left of a character that the tokens cut
        lines = [CONTROL_CHARACTERS.sub("", line).replace("\ufffd", "") for line in re.split("[\r\n]", beginning)]
        return _first_words(next((line for line in lines[1:-1] if line.strip()), lines[0]).strip())

    def characters_seen(self, steps: int) -> float:
        """How much of the training text so many optimizer steps have read, again and again included; on average, for
        windows differ. It compares across tokenizers and batch sizes, which steps do not."""
        self._check_set_up()
        return steps * self.batch_size / self._windows_per_epoch() * self._train_chars

    def predict_dataloader(self) -> DataLoader[list[str]]:
        """Batches of prompts, which go round the ranks; some ranks may get an empty last one."""
        rank, world_size, _ = self._share()
        if self.prompts == "-" and world_size > 1:
            raise UserError(
                "several processes cannot share the standard input: pass a file, --data.prompts prompts.txt"
            )
        prompts, size = _read_prompts(self.prompts), self.prompt_batch_size or 1
        batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        batches += [[]] * (-len(batches) % world_size)
        share = cast("Dataset[list[str]]", batches[rank::world_size])  # a list will do
        return DataLoader(share, batch_size=None)

    def prepare(self, part: tuple[int, int] = (0, 1)) -> TokenStore | None:
        """What `prepare_data` does, or one of n jobs' share of it.

        Args:
            part: (k, n): of the shards that are to be encoded, each n-th from the k-th on.

        Returns:
            the whole store; None as long as other parts of it are missing.

        Raises:
            UserError: see `prepare_data`.
        """
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._check_batch_size()
        store, fingerprint = self._text.store(self._given, part)
        if store is None:
            return None
        if fingerprint is None:
            self._check_settings(store)
        self._place = str(store.folder), fingerprint
        self._fit_to(store)
        return store

    # What they are made of

    def _check_settings(self, store: TokenStore) -> None:
        """Refuses flags that ask for other tokens than a store has that the user has named."""
        made_with, defaults = store.about["settings"], TextDataModule()._text.settings()
        for name, value in self._text.settings().items():
            made = made_with.get(name, defaults[name])
            if value != defaults[name] and value != made:
                raise UserError(
                    f"the tokens in '{self.corpus}' were made with data.{name} {json.dumps(made)}, not "
                    f"{json.dumps(value)}: leave that out, or prepare the text again"
                )
        if store.streamed:
            streaming.litdata()
            if self.subword_sampling or self.windows != "epoch":
                raise UserError(
                    f"the tokens in '{self.corpus}' are streamed in litdata's order: data.subword_sampling and "
                    "data.windows random need a store that is not"
                )
        if self._given and self._given.fingerprint != store.tokenizer.fingerprint:
            raise UserError(
                f"the tokens in '{self.corpus}' are of another tokenizer than the checkpoint's: pass the text itself, or "
                "what `lmlight prepare --init_from` makes of it"
            )

    def _check_set_up(self) -> None:
        if not hasattr(self, "_val_ids"):
            raise UserError("call prepare_data() and setup('fit') before asking for data; a Trainer does both")

    def _predicting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    def _share(self) -> tuple[int, int, int]:
        """(rank, world_size, accumulate): one process where there is no trainer."""
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def _check_batch_size(self) -> None:
        _, world_size, accumulate = self._share()
        if accumulate < 1:
            raise UserError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulate}")
        if self.batch_size % (world_size * accumulate):
            raise UserError(
                f"data.batch_size {self.batch_size} is the whole step's: it must be a multiple of {world_size} "
                f"processes × {accumulate} accumulated batches"
            )

    def _fit_to(self, store: TokenStore) -> None:
        """Lowers `block_size` to what the training text has room for, and says so.

        Done before anything else begins to run; a text that is too short even so raises `UserError`.
        """
        chars = sum(store.chars[split] for split in ("train", "val"))
        tokens = len(store.ids["train"])
        if tokens <= self.block_size:  # a window reads one token more
            if chars < FEWEST_CHARS or tokens < 8:
                self._too_short("training", tokens, chars, store.chars["train"])
            fits = (tokens - 1) // 4  # so that there are some windows to choose from
            rank_zero_warn(
                f"the training text has {tokens:,} tokens: data.block_size is {fits} in place of {self.block_size}"
            )
            self.block_size = fits
        for split, name in (("val", "validation"), ("test", "test")):
            if split in store.ids and (tokens := len(store.ids[split])) < self.block_size:
                if not tokens:
                    self._too_short(name, tokens, chars)
                rank_zero_warn(
                    f"the {name} text has {tokens:,} tokens, fewer than a block of {self.block_size}: its figures are rough"
                )

    def _too_short(self, name: str, tokens: int, chars: int, split_chars: int = 0) -> None:
        text = self._text
        source = {"validation": text.val_corpus, "test": text.test_corpus}.get(name) or self.corpus
        share = 1.0
        if source == self.corpus and not text.val_corpus:
            share = 1 - text.val_fraction if name == "training" else text.val_fraction
        per_token = max(1.0, split_chars / max(1, tokens))
        minimum = math.ceil((self.block_size + 1) * per_token / share)
        raise UserError(
            f"the {name} part of '{source}' has {tokens:,} tokens, fewer than one block of {self.block_size}: pass a "
            f"text of at least some {minimum:,} characters (this one has {chars:,}), or lower --data.block_size"
        )

    def _char_counts(self, ids: npt.NDArray[np.integer] | TokenArray, chars: int) -> npt.NDArray[np.number]:
        """The characters each id stands for; for a lossy tokenizer, scaled so that they add up to the original text."""
        assert self.tokenizer is not None
        counts = self.tokenizer.char_counts
        if self.tokenizer.lossless:
            return counts
        occurrences = (
            ids.counts(len(counts)) if isinstance(ids, TokenArray) else np.bincount(ids, minlength=len(counts))
        )
        return (counts * (chars / (occurrences @ counts))).astype(np.float32)  # MPS has no float64

    def _windows_per_epoch(self) -> int:
        if self._streamed:
            return self._streamed // (self.block_size + 1)  # and some fewer, where chunks end
        if self._resegmenter:
            return int(windows_in_shards(self._train_ids, self.block_size).sum())
        return windows_per_epoch(len(self._train_ids), self.block_size)

    def _train_windows(self, epoch: int) -> Windows | ShardedWindows:
        if self._resegmenter:
            sharded = ShardedEpoch(self._resegmenter, self.block_size, self.seed, epoch)
            return ShardedWindows(sharded, self._train_counts)
        ids: npt.NDArray[np.integer] | TokenArray = self._train_ids
        counts = self._train_counts
        if self._sampler:
            ids = self._sampler.draw(self.seed, epoch)
            counts = self._char_counts(ids, self._train_chars)
        starts = (epoch_starts if self.windows == "epoch" else random_starts)(
            len(ids), self.block_size, self.seed, epoch
        )
        # every epoch has as many windows, however long its segmentation is
        starts = np.resize(starts, self._windows_per_epoch())
        return Windows(ids, starts, self.block_size, counts)

    def _whole_loader(self, ids: TokenArray, char_counts: npt.NDArray[np.number], stride: int) -> DataLoader[Batch]:
        """Every token of a text, behind the last training token as context, scored once."""
        return self._scoring_loader(ids, char_counts, eval_windows(len(ids), self.block_size, stride))

    def _scoring_loader(
        self, ids: TokenArray, char_counts: npt.NDArray[np.number], plan: npt.NDArray[np.int64]
    ) -> DataLoader[Batch]:
        """This rank's share of the windows of a plan, of which only the last may be shorter than a block."""
        rank, world_size, _ = self._share()
        length = min(self.block_size, len(ids) - 1)
        nothing = np.array([[0, length, length]])  # a window of which no token is scored
        starts, lengths, scored_from = np.concatenate((plan, nothing)).T
        windows = Windows(ids, starts, lengths, char_counts, scored_from)
        last = len(plan)
        full = int((lengths[:last] == self.block_size).sum())  # the shorter one is a batch of its own
        # whole batches go round the ranks, and all get as many, or those that have more would wait for the others
        batch_size = min(self.batch_size, max(1, EVAL_LOGITS // (length * len(char_counts))))
        batches = EvalBatchSampler(full, last, batch_size, rank, world_size)
        # a generator of its own: the loader would take a number from the global one, which is training's
        return DataLoader(windows, batch_sampler=batches, collate_fn=identity_collate, generator=torch.Generator())


def _first_words(line: str) -> str:
    """At most `SAMPLE_PROMPT_CHARS` characters of the beginning of a line, cut between words if possible."""
    if len(line) <= SAMPLE_PROMPT_CHARS:
        return line
    end = line.rfind(" ", 1, SAMPLE_PROMPT_CHARS + 1)
    if end == -1:
        end = SAMPLE_PROMPT_CHARS
        while end > 1 and (_extends(line[end]) or line[end - 1] == ZERO_WIDTH_JOINER):
            end -= 1
    return line[:end].rstrip()


def _extends(character: str) -> bool:
    """Whether a character belongs to the one before it: a combining mark, a joiner, or the skin tone of an emoji."""
    return unicodedata.category(character)[0] == "M" or character == ZERO_WIDTH_JOINER or "🏻" <= character <= "🏿"


def _read_prompts(prompts: Sequence[str] | str) -> list[str]:
    """The prompts themselves, or the lines of a file of them.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    if not isinstance(prompts, str):
        return list(prompts)
    try:
        content = sys.stdin.buffer.read() if prompts == "-" else Path(prompts).expanduser().read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts file '{prompts}' cannot be read ({getattr(error, 'strerror', 'not UTF-8')}): pass a UTF-8 file with "
            """one prompt a line, or a list: --data.prompts '["ROMEO:"]'"""
        ) from None
    lines = [line.removesuffix("\r") for line in lines]
    return lines[:-1] if lines[-1] == "" else lines
