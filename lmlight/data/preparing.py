"""From a corpus to its token store.

A store is named after the text and every setting that the tokens depend on, so stale tokens are never used
after a setting has changed.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sentencepiece
from tqdm import tqdm

from lmlight.data import corpus as corpora
from lmlight.data.cache import cache_dir, writing_cache
from lmlight.data.corpus import Corpus
from lmlight.data.download import find_files, store_folder
from lmlight.data.reading import RECORD_SUFFIXES, TextChunk, TextFormat, file_format
from lmlight.data.token_store import FORMAT_VERSION, TokenStore
from lmlight.data.token_writer import read_tokenizer, write_store
from lmlight.data.tokenizer import Tokenizer, TokenizerConfig, check_tokenizer
from lmlight.errors import UserError, check_literals
from lmlight.user_code import full_name


@dataclass(frozen=True)
class CorpusSpec:
    """A corpus and how it becomes tokens. The arguments are those of `TextDataModule`.

    Raises:
        UserError: a corpus is an empty string, or neither a string nor a path; `val_fraction` is outside (0, 1);
            `validate_on` is not a valid choice.
    """

    corpus: str
    val_fraction: float = 0.1
    val_corpus: str | None = None
    test_corpus: str | None = None
    text_format: TextFormat = TextFormat()
    tokenizer: TokenizerConfig = TokenizerConfig()
    cache: str | None = None
    validate_on: Literal["val", "tune"] = "val"

    def __post_init__(self) -> None:
        for name in ("corpus", "val_corpus", "test_corpus"):
            given = getattr(self, name)
            if given == "" or not (isinstance(given, (str, os.PathLike)) or (given is None and name != "corpus")):
                expected = "a path, a pattern, a URL or the name of a corpus"
                raise UserError(f"data.{name} must be {expected}, got {given!r}")
            object.__setattr__(self, name, given and os.fspath(given))
        check_literals(CorpusSpec, vars(self), "data.")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"data.val_fraction must be above 0 and below 1, got {self.val_fraction}")

    def settings(self) -> dict[str, Any]:
        """The settings that the tokens depend on, by the names of their flags."""
        names = ("val_fraction", "val_corpus", "test_corpus", "validate_on")
        tokenizer = {f"tokenizer.{name}": value for name, value in asdict(self.tokenizer).items()}
        return {name: getattr(self, name) for name in names} | asdict(self.text_format) | tokenizer

    def prepare_store(self, pretrained_tokenizer: Tokenizer | None = None) -> TokenStore:
        """The corpus's token store, which is created if needed.

        Args:
            pretrained_tokenizer: encodes the text in place of a tokenizer trained on it.

        Raises:
            UserError: a text is missing, unreadable or too short; the tokenizer does not fit it; the cache is not writable;
                `corpus` is a store that was made with other settings.
        """
        if pretrained_tokenizer and not full_name(type(pretrained_tokenizer)).startswith("lmlight."):
            check_tokenizer(pretrained_tokenizer)
        found = find_files(self.corpus, self.cache)
        if prepared := store_folder(found):
            store = TokenStore(prepared)
            self._check_settings(store, pretrained_tokenizer)
            return store
        main = corpora.open_files(self.corpus, found, self.text_format)
        others = (self.val_corpus, self.test_corpus)
        val, test = (corpora.load(name, self.text_format, self.cache) if name else None for name in others)
        self._check_format([corpus for corpus in (main, val, test) if corpus])
        trained = {"config": asdict(self.tokenizer), "sentencepiece": sentencepiece.__version__}
        depends_on = {
            "format_version": FORMAT_VERSION,
            "corpus": main.fingerprint,
            "val": val.fingerprint if val else self.val_fraction,
            "test": test and test.fingerprint,
            "tokenizer": {"fingerprint": pretrained_tokenizer.fingerprint} if pretrained_tokenizer else trained,
            "tune": self.val_fraction if self.validate_on == "tune" else None,
        }
        fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        folder = cache_dir(self.cache) / "tokens" / fingerprint[:16]
        if not TokenStore.is_finished(folder):
            texts, cut = self._split(main, val, test)
            tokenizer = pretrained_tokenizer or read_tokenizer(folder) or self._train_tokenizer(main, cut)
            has_documents = any(corpus.has_documents for corpus in (main, val, test) if corpus)
            if has_documents and tokenizer.eos_id is None:
                warnings.warn("this tokenizer has no EOS token: documents are joined without a separator", stacklevel=2)
            metadata = {"corpus": self.corpus, "vocab_size": tokenizer.vocab_size, "settings": self.settings()}
            total = sum(corpus.n_chars for corpus in (main, val, test) if corpus)
            with writing_cache(folder):
                write_store(folder, fingerprint, texts, tokenizer, metadata, total)
        return TokenStore(folder, fingerprint)

    def _split(
        self, main: Corpus, val: Corpus | None, test: Corpus | None
    ) -> tuple[dict[str, Iterator[TextChunk]], int]:
        """The text of each split, and the number of characters for training."""
        cut = main.n_chars if val else corpora.train_chars(main.n_chars, self.val_fraction)
        texts = {"val": val.chunks() if val else main.chunks(cut)}
        if self.validate_on == "tune":
            end, cut = cut, corpora.train_chars(cut, self.val_fraction)
            texts = {"val": main.chunks(cut, end), "test": texts["val"]}
        if test:
            texts["test"] = test.chunks()
        if not cut:
            raise UserError(f"the training split of '{self.corpus}' has no text: pass at least 1,000 characters")
        return {"train": main.chunks(0, cut), **texts}, cut

    def _train_tokenizer(self, corpus: Corpus, cut: int) -> Tokenizer:
        # SentencePiece reports no progress, so a line without a bar
        with tqdm(desc="training the tokenizer", bar_format="{desc} ...", leave=False, disable=None):
            chunks = (chunk.text for chunk in corpus.chunks(0, cut))
            return self.tokenizer.train(chunks, cut, add_eos=corpus.has_documents)

    def _check_format(self, texts: list[Corpus]) -> None:
        """Warns about settings that apply to none of the files: not an error, as they may come from an earlier run."""
        suffixes = {file_format(file.name)[0] for text in texts for file in text.files}
        if self.text_format.field != TextFormat.field and not suffixes & set(RECORD_SUFFIXES):
            warnings.warn("data.field is ignored: no file is .jsonl or .parquet", stacklevel=2)
        if self.text_format.separator and suffixes <= set(RECORD_SUFFIXES):
            warnings.warn("data.separator is ignored: the records of a file are documents already", stacklevel=2)

    def _check_settings(self, store: TokenStore, pretrained_tokenizer: Tokenizer | None) -> None:
        """Refuses settings that are neither the defaults nor those that a prepared store was made with."""
        made_with, defaults = store.metadata.get("settings", {}), CorpusSpec("any").settings()
        for name, value in self.settings().items():
            if value not in (defaults[name], made := made_with.get(name, defaults[name])):
                raise UserError(
                    f"the tokens in '{self.corpus}' were made with data.{name} {json.dumps(made)}, not "
                    f"{json.dumps(value)}: leave that out, or prepare the text again"
                )
        if pretrained_tokenizer and pretrained_tokenizer.fingerprint != store.tokenizer.fingerprint:
            raise UserError(
                f"the tokens in '{self.corpus}' are not from this run's tokenizer: pass the text itself, or prepare "
                "it with the same --data.tokenizer or --init_from"
            )


def check_lengths(store: TokenStore, corpus: str, block_size: int) -> None:
    """Raises a `UserError` if the training text is shorter than a window, or an evaluation text has no tokens."""
    tokens, chars = len(store.ids["train"]), store.chars["train"]
    if tokens <= block_size:  # a window reads one token more
        raise UserError(
            f"the training split of '{corpus}' has {tokens:,} tokens in {chars:,} characters, fewer than a window of "
            f"{block_size} + 1: pass a longer text, or lower --data.block_size"
        )
    for split, ids in store.ids.items():
        if not len(ids):
            raise UserError(f"the {split} text of '{corpus}' has no tokens: pass a longer text")
