"""lmlight: small transformer language models on text, with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

from lmlight.version import __version__ as __version__

if TYPE_CHECKING:
    from lmlight.generation import Sampling
    from lmlight.models import Bigram, Transformer
    from lmlight.training.datamodule import TextDataModule
    from lmlight.training.distillation import DistilledModel
    from lmlight.training.lora import LoRAModel
    from lmlight.training.module import LanguageModel

__all__ = ["Bigram", "DistilledModel", "LanguageModel", "LoRAModel", "Sampling", "TextDataModule", "Transformer"]

_HOMES = {
    "Bigram": "lmlight.models",
    "DistilledModel": "lmlight.training.distillation",
    "LanguageModel": "lmlight.training.module",
    "LoRAModel": "lmlight.training.lora",
    "Sampling": "lmlight.generation",
    "TextDataModule": "lmlight.training.datamodule",
    "Transformer": "lmlight.models",
}


def __getattr__(name: str) -> Any:
    """Import on first use: corpora and tokenizers do not need torch or Lightning, which load slowly."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmlight' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
