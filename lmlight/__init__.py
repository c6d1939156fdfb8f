"""lmlight: small transformer language models on text, with PyTorch Lightning."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmlight.generation import Sampling
    from lmlight.models import Bigram, Transformer
    from lmlight.training.datamodule import TextDataModule
    from lmlight.training.module import LanguageModel

__version__ = "0.1.0"
__all__ = ["Bigram", "LanguageModel", "Sampling", "TextDataModule", "Transformer"]

_HOMES = {
    "Bigram": "lmlight.models",
    "LanguageModel": "lmlight.training.module",
    "Sampling": "lmlight.generation",
    "TextDataModule": "lmlight.training.datamodule",
    "Transformer": "lmlight.models",
}

# torch's OpenMP threads spin at their barriers, by default so long that a second busy process on the same cores makes a
# training step up to 30 times slower. Bounded to 1,000 turns, a step of the default takes on two cores some 187 ms alone
# (171 without a bound) and 333 beside a busy process (2,361 with 100,000 turns).
# libgomp reads it when torch is imported, so it is here.
bounds_spinning = not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
if bounds_spinning:
    os.environ["GOMP_SPINCOUNT"] = "1000"


def __getattr__(name: str) -> Any:
    """Imports on first use: the corpus and the tokenizer are to be had without waiting for torch and lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmlight' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
