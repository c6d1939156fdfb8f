"""Networks: token ids in, logits out."""

from lmlight.models.attention import Attention
from lmlight.models.base import Net, architecture_kwargs
from lmlight.models.bigram import Bigram
from lmlight.models.transformer import GPT2, LLAMA, Transformer

NETS: dict[str, type[Net]] = {"Bigram": Bigram, "Transformer": Transformer}
"""The networks that a checkpoint may name."""

__all__ = ["GPT2", "LLAMA", "NETS", "Attention", "Bigram", "Net", "Transformer", "architecture_kwargs"]
