"""TextDataModule: prepares a text and serves windows of its tokens.

`prepare_data` (one process) leaves a token store in the cache; `setup` (every process) opens it.
"""

from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lmlight.data.download import BUILTIN_CORPORA
from lmlight.data.hf_tokenizer import read_pretrained
from lmlight.data.loader import EvalLoader, StatefulTrainLoader
from lmlight.data.preparing import CorpusSpec, check_lengths
from lmlight.data.prompts import first_line, prompt_batches
from lmlight.data.reading import TextFormat
from lmlight.data.streaming import streamed_windows
from lmlight.data.subword_regularization import SubwordSampling, resegmented_windows
from lmlight.data.token_store import TokenArray, TokenStore
from lmlight.data.tokenizer import Tokenizer, TokenizerConfig
from lmlight.data.windows import TrainBatchSampler, WindowSource, eval_windows, stored_windows, subset_windows
from lmlight.errors import UserError, check_literals
from lmlight.user_code import explained, import_class, is_class_name


class TextDataModule(LightningDataModule):
    """Serves a text as token windows for training, validation and testing, and prompts for prediction.

    Splits are measured in characters, so they do not depend on the tokenizer, which is trained on the training split only.
    Validation windows do not overlap and score every token once. `test` has a second loader with a sliding window.

    Args:
        corpus: name of a corpus (`tinyshakespeare`), a file, a folder, a glob pattern (`books/**/*.txt`), or a URL that
            fsspec opens (`https://`, `s3://`, `hf://`). Files are `.parquet`, or text or `.jsonl`, which may be
            compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Also the folder that `lmlight prepare --to` wrote, or a copy of it.
        block_size: tokens per window, the longest context of the net.
        batch_size: windows per optimizer step, over all devices and accumulated batches together.
        val_fraction: fraction of the characters, at the end of the text, held out for validation.
        val_corpus: another corpus for validation. All of `corpus` is then used for training, unless
            `validate_on` is `tune`.
        test_corpus: another corpus for `test`. `null` uses the validation text.
        validate_on: `tune` validates on the last `val_fraction` of the training split and trains on the rest of it, so that
            settings can be chosen without the validation text, which `test` then scores.
        field: the field of `.jsonl` and `.parquet` records that holds the text.
        separator: string between two documents in text files, such as `<|endoftext|>`. `null` reads a file as one text.
        errors: what to do with invalid bytes: `strict` raises, `replace` inserts U+FFFD.
        encoding: encoding of text and `.jsonl` files; any that Python supports. `utf-8-sig` drops a byte order mark.
        cache: folder for downloads and tokens. `null` uses `$LMLIGHT_CACHE` or the platform's cache folder.
        tokenizer: the tokenizer to train, or a trained one: a Hugging Face `tokenizer.json`, a SentencePiece `.model`
            file, or the full name of your own `Tokenizer` class. From Python, you can also set the attribute `tokenizer`.
            Ignored if a checkpoint provides one.
        subword_sampling: sample a new segmentation of the training text in every epoch. `null` disables this.
        windows: `epoch` visits non-overlapping windows in random order; `random` draws each window independently.
        prompts: for `predict`: a list, or a file with one prompt per line (`-` reads standard input).
        prompt_batch_size: prompts that `predict` continues together.
        num_workers: number of DataLoader processes. With `subword_sampling`, the number of processes that
            segment the next shards.
        seed: determines the order of the windows and the sampled segmentations.

    Raises:
        UserError: an argument is out of range or of the wrong type; `subword_sampling` without a unigram tokenizer.
    """

    def __init__(
        self,
        corpus: str = "tinyshakespeare",
        block_size: int = 128,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        val_corpus: str | None = None,
        test_corpus: str | None = None,
        validate_on: Literal["val", "tune"] = "val",
        field: str = "text",
        separator: str | None = None,
        errors: Literal["strict", "replace"] = "strict",
        encoding: str = "utf-8",
        cache: str | None = None,
        tokenizer: TokenizerConfig | str = TokenizerConfig(),
        subword_sampling: SubwordSampling | None = None,
        windows: Literal["epoch", "random"] = "epoch",
        prompts: list[str] | str = [""],  # noqa: B006  (never changed)
        prompt_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        check_literals(TextDataModule.__init__, locals(), "data.")
        minima = {"block_size": 1, "batch_size": 1, "prompt_batch_size": 1, "num_workers": 0}
        for name, minimum in minima.items():
            if (value := locals()[name]) < minimum:
                raise UserError(f"data.{name} must be at least {minimum}, got {value}")
        config = tokenizer if isinstance(tokenizer, TokenizerConfig) else TokenizerConfig()
        if subword_sampling and config.kind != "unigram":
            raise UserError(f"data.subword_sampling needs data.tokenizer.kind unigram, got {config.kind}")
        text_format = TextFormat(field, separator, errors, encoding)
        self._spec = CorpusSpec(corpus, val_fraction, val_corpus, test_corpus, text_format, config, cache, validate_on)
        self.corpus, self.block_size, self.batch_size = self._spec.corpus, block_size, batch_size
        self.subword_sampling, self.windows, self.prompts = subword_sampling, windows, prompts
        self.prompt_batch_size, self.num_workers, self.seed = prompt_batch_size, num_workers, seed
        self._pretrained_tokenizer: Tokenizer | None = None
        self._tokenizer_file: Path | None = None
        if isinstance(tokenizer, str) and is_class_name(tokenizer):
            kind = import_class("data.tokenizer", tokenizer, Tokenizer)
            with explained(f"data.tokenizer {tokenizer} cannot be created"):
                self._pretrained_tokenizer = kind()
        elif isinstance(tokenizer, (str, Path)):
            self._tokenizer_file = Path(tokenizer)
        elif not isinstance(tokenizer, TokenizerConfig):
            raise UserError(
                f"data.tokenizer must be a TokenizerConfig, a file or a class name, got a {type(tokenizer).__name__}: "
                "set the attribute tokenizer to use a trained tokenizer"
            )
        self._error, self._folder = "", ""  # from `prepare_data`, for the other ranks
        self._store: TokenStore | None = None
        self._source: WindowSource
        self._train_loader: StatefulTrainLoader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None, "_train_loader": None}  # like `LightningModule.__getstate__`

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer: set before `prepare_data` to use a pretrained one, otherwise known after `setup`."""
        return self._pretrained_tokenizer or (self._store.tokenizer if self._store else None)

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._pretrained_tokenizer = tokenizer

    def check_batch_size(self, trainer: Trainer) -> None:
        """Checks that a step's windows can be split among processes and accumulated batches, see `TrainBatchSampler`."""
        TrainBatchSampler(1, self.batch_size, *_ranks(trainer))

    def prepare_data(self) -> None:
        """Downloads the corpus, trains the tokenizer and encodes the text, unless the cache has the result.

        Raises:
            UserError: see `CorpusSpec.prepare_store`, `check_lengths` and `TrainBatchSampler`.
        """
        if not self._running(TrainerFn.PREDICTING):
            try:
                self.prepare()
            except UserError as error:
                if self.trainer is None or self.trainer.world_size == 1:
                    raise
                self._error = str(error)  # the other ranks wait at a barrier, so `setup` raises on all of them

    def prepare(self) -> TokenStore:
        """Does what `prepare_data` does and returns the store."""
        if self.trainer is not None and self._running(TrainerFn.FITTING):
            self.check_batch_size(self.trainer)  # before anything is downloaded
        if self._tokenizer_file and self._pretrained_tokenizer is None:
            self._pretrained_tokenizer = read_pretrained(self._tokenizer_file)
        store = self._spec.prepare_store(self._pretrained_tokenizer)
        if store.streamed and self.subword_sampling:
            raise UserError(f"the tokens in '{self.corpus}' are streamed: set --data.subword_sampling null")
        check_lengths(store, self.corpus, self.block_size)
        self._folder = str(store.folder)
        return store

    def setup(self, stage: str) -> None:
        """Opens the prepared tokens."""
        if self._running(TrainerFn.PREDICTING):
            return
        if self.trainer is not None:
            self._error, self._folder = self.trainer.strategy.broadcast((self._error, self._folder))
        if self._error or not self._folder:
            raise UserError(self._error or "call prepare_data() before setup(); a Trainer does both")
        self.teardown(stage)
        self._train_loader = None
        store = TokenStore(Path(self._folder))
        if not store.tokenizer.lossless:
            rank_zero_warn("this tokenizer is lossy: metrics count the characters of the original text")
        train = store.ids["train"]
        order = self.block_size, self.seed, self.windows
        if stage == "fit" and store.streamed:
            self._source = streamed_windows(store, self.corpus if "://" in self.corpus else self._folder, *order)
        elif stage == "fit" and self.subword_sampling:
            sampling = self.subword_sampling
            self._source = resegmented_windows(train, store.tokenizer, sampling, self.num_workers, *order)
        else:
            self._source = stored_windows(train, *order, self.num_workers)
        self._store = store

    def teardown(self, stage: str) -> None:
        if self._store is not None:
            self._source.close()

    def train_dataloader(self) -> StatefulTrainLoader:
        store, n_windows = self.store, len(self._source)
        sampler = TrainBatchSampler(n_windows, self.batch_size, *_ranks(self.trainer))
        is_training = self.trainer is not None and self.trainer.training
        if self._train_loader is not None and is_training and self._train_loader.sampler == sampler:
            return self._train_loader  # a new one would repeat the first epoch
        seen = self.trainer.max_steps * self.batch_size if self.trainer is not None else 0
        if self.subword_sampling and 0 < seen < n_windows and self._running(TrainerFn.FITTING):
            rank_zero_warn(
                f"this run sees {seen / n_windows:.0%} of the training text, little or none of it twice, so "
                "subword_sampling only makes the token sequence longer: set it to null"
            )
        if self.trainer is None:
            return StatefulTrainLoader(store, self._source, sampler)
        device = self.trainer.strategy.root_device
        pinned = device if device.type == "cuda" else None
        limit, repeat = self.trainer.limit_train_batches, self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # set outside __init__
        self._train_loader = StatefulTrainLoader(store, self._source, sampler, pinned, limit, repeat)
        return self._train_loader

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader("val", self.block_size)

    def test_dataloader(self) -> list[EvalLoader]:
        """The test text in non-overlapping windows, and in sliding windows with half a block of context."""
        return [self._eval_loader("test", stride) for stride in (self.block_size, -(-self.block_size // 2))]

    def train_subset_dataloader(self, windows: int) -> EvalLoader:
        """Up to `windows` evenly spaced windows of the training text, scored like the validation text.

        If the training text is streamed, only its end is used.
        """
        ids = self.store.ids["train"]
        chosen = subset_windows(len(ids), self.block_size, windows)
        return EvalLoader(ids, chosen, self.store.char_counts["train"], self.batch_size, *_ranks(self.trainer)[:2])

    def predict_dataloader(self) -> DataLoader[list[str]]:
        """Batches of prompts, distributed over the ranks; the last one may be empty on some ranks."""
        batches = prompt_batches(self.prompts, self.prompt_batch_size, *_ranks(self.trainer)[:2])
        return DataLoader(cast("Dataset[list[str]]", batches), batch_size=None)

    @property
    def store(self) -> TokenStore:
        """The prepared tokens, available after `setup`."""
        if self._store is None:
            raise UserError("call prepare_data() and setup('fit') before asking for data; a Trainer does both")
        return self._store

    @property
    def val_ids(self) -> TokenArray:
        """The last training token and the validation tokens, memory-mapped."""
        return self.store.eval_ids["val"]

    @property
    def sample_prompt(self) -> str:
        """A prompt for samples: the built-in corpus's own, or the start of the first whole line of the validation text."""
        if self.corpus in BUILTIN_CORPORA:
            return BUILTIN_CORPORA[self.corpus].sample_prompt
        return first_line(self.store.tokenizer.decode(self.val_ids[1:129].tolist()))

    def characters_seen(self, steps: int) -> float:
        """Average number of training characters in `steps` optimizer steps; with `subword_sampling`, an upper bound."""
        return steps * self.batch_size * self.store.chars["train"] / len(self._source)

    def _running(self, fn: TrainerFn) -> bool:
        return self.trainer is not None and self.trainer.state.fn == fn

    def _eval_loader(self, split: str, stride: int) -> EvalLoader:
        split = split if split in self.store.ids else "val"
        ids = self.store.eval_ids[split]
        windows = eval_windows(len(ids), self.block_size, stride)
        return EvalLoader(ids, windows, self.store.char_counts[split], self.batch_size, *_ranks(self.trainer)[:2])


def _ranks(trainer: Trainer | None) -> tuple[int, int, int]:
    """(rank, world_size, accumulate_grad_batches); without a trainer, those of a single process."""
    return (trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches) if trainer else (0, 1, 1)
