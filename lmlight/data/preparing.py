"""From a text to its token store: what a store depends on, where it lies, and how it is made.

The key of a store is made of the text's hash and of every setting that its tokens depend on, so a changed setting never
meets a stale cache.

Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from lmlight.data import corpus as corpora
from lmlight.data.cache import cache_dir
from lmlight.data.corpus import Corpus
from lmlight.data.reading import TextFormat
from lmlight.data.token_store import LAYOUT, TokenStore
from lmlight.data.tokenizer import Tokenizer, TokenizerConfig
from lmlight.errors import UserError

# A tokenizer takes a second or more to learn from so many characters.
NOTICED_CHARS = 1_000_000


@dataclass(frozen=True)
class CorpusSpec:
    """A text as it is to be tokenized; the arguments are those of `TextDataModule`.

    Args:
        corpus: for training, and for validation where `val_corpus` is None; or a store that has been prepared.
        val_fraction: of its characters.
        val_corpus: another one for validation.
        test_corpus: another one for the test.
        reading: how files become text.
        tokenizer: which tokenizer to train.
        cache: the cache's folder, if not the usual one.
    """

    corpus: str
    val_fraction: float
    val_corpus: str | None
    test_corpus: str | None
    reading: TextFormat
    tokenizer: TokenizerConfig
    cache: str | None

    def settings(self) -> dict[str, Any]:
        """What the tokens depend on, the text apart, by the names of the flags."""
        return {
            "val_fraction": self.val_fraction,
            "val_corpus": self.val_corpus,
            "test_corpus": self.test_corpus,
            **asdict(self.reading),
            **{f"tokenizer.{name}": value for name, value in asdict(self.tokenizer).items()},
        }

    def store(self, given: Tokenizer | None, part: tuple[int, int]) -> tuple[TokenStore | None, str | None]:
        """Finds the text's store, or makes it.

        Args:
            given: a tokenizer to take in place of training one.
            part: (k, n): of the shards that are to be encoded, each n-th from the k-th on.

        Returns:
            the store, or None as long as other parts of it are missing; and its fingerprint, which a store that the user
            names has no need of.

        Raises:
            UserError: see `corpus.load`, `Corpus.chunks`, `TokenizerConfig.train` and `TokenStore`; the text is too short
                to be split; the cache cannot be written.
        """
        named = corpora.find_store(self.corpus, self.cache)
        if named is not None:
            return TokenStore(named), None
        main, val, test = (
            corpora.load(source, self.reading, self.cache) if source else None
            for source in (self.corpus, self.val_corpus, self.test_corpus)
        )
        assert main is not None
        folder, fingerprint = self._key(main, val, test, given)
        whole = TokenStore.finished(folder) or self._write(folder, fingerprint, main, val, test, given, part)
        return (TokenStore(folder, fingerprint) if whole else None), fingerprint

    def _key(self, main: Corpus, val: Corpus | None, test: Corpus | None, given: Tokenizer | None) -> tuple[Path, str]:
        """Where the store is, and the fingerprint of all that its content depends on."""
        tokenizer = (
            {"fingerprint": given.fingerprint}
            if given
            else {"config": asdict(self.tokenizer), "sentencepiece": sentencepiece.__version__}
        )
        depends_on = {
            "layout": LAYOUT,
            "corpus": main.fingerprint,
            "val": val.fingerprint if val else self.val_fraction,
            "test": test and test.fingerprint,
            "tokenizer": tokenizer,
        }
        fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return cache_dir(self.cache) / "tokens" / fingerprint[:16], fingerprint

    def _write(
        self,
        folder: Path,
        fingerprint: str,
        main: Corpus,
        val: Corpus | None,
        test: Corpus | None,
        given: Tokenizer | None,
        part: tuple[int, int],
    ) -> bool:
        chars, _ = main.size
        cut = chars if val else corpora.train_chars(chars, self.val_fraction)
        if not 0 < cut <= chars - (val is None):
            empty = "validation" if cut else "training"
            raise UserError(
                f"the {empty} part of '{self.corpus}' has no text: pass a text of at least some 1,000 characters (this "
                f"one has {chars:,})"
            )
        texts = {"train": main.chunks(0, cut), "val": val.chunks() if val else main.chunks(cut)}
        if test:
            texts["test"] = test.chunks()
        tokenizer = given or TokenStore.tokenizer_of(folder)  # of a preparation that was interrupted
        if tokenizer is None:
            tokenizer = self._train(main, cut)
        if main.has_documents and tokenizer.eos_id is None:
            warnings.warn(
                "this tokenizer has no token for the end of a document: documents follow each other without a mark",
                stacklevel=2,
            )
        about = {"corpus": self.corpus, "vocab_size": tokenizer.vocab_size, "settings": self.settings()}
        try:
            size = sum(corpus.size[1] for corpus in (main, val, test) if corpus)
            return TokenStore.write(folder, fingerprint, texts, tokenizer, about, size, part=part)
        except OSError as error:
            raise UserError(
                f"cache folder '{folder.parent}' cannot be written ({error.strerror}): free some space, or pass another, "
                "--data.cache FOLDER, or set LMLIGHT_CACHE"
            ) from None

    def _train(self, main: Corpus, cut: int) -> Tokenizer:
        chunks = (chunk.text for chunk in main.chunks(0, cut))
        # a line while one waits, without a bar: SentencePiece does not say how far it is
        disable = None if cut > NOTICED_CHARS else True
        with tqdm(desc="training the tokenizer", bar_format="{desc} ...", leave=False, disable=disable):
            return self.tokenizer.train(chunks, cut, add_eos=main.has_documents)
