"""Networks: token ids in, logits out."""

from lmlight.models.attention import Attention
from lmlight.models.base import Net, architecture_kwargs
from lmlight.models.bigram import Bigram
from lmlight.models.transformer import GPT2, LLAMA, Transformer

__all__ = ["GPT2", "LLAMA", "Attention", "Bigram", "Net", "Transformer", "architecture_kwargs"]
