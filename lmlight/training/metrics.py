"""Metrics that are comparable across tokenizers: nats and bits per character.

Sums are accumulated in float64, reduced across processes, and divided once.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lmlight.data.loader import IGNORE_INDEX

# MPS has no float64; there, float32 sums of hundreds of thousands of losses are accurate to 5 digits.
SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


class TextLoss(Metric):
    """Loss over a text: nats per token and perplexity. If characters are counted, also nats and bits per character."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "characters"):
            self.add_state(name, torch.zeros((), dtype=SUM_DTYPE), dist_reduce_fx="sum")
        self.nats: Tensor
        self.tokens: Tensor
        self.characters: Tensor

    def update(self, losses: Tensor, targets: Tensor, target_chars: Tensor) -> None:
        """Add (B, T) nats, token ids and characters; unscored positions have `IGNORE_INDEX`, 0 nats and 0 characters."""
        self.nats = self.nats + losses.sum(dtype=SUM_DTYPE)
        # in SUM_DTYPE too: precision bf16-true makes the states bfloat16, which does not count beyond 256
        self.tokens = self.tokens + (targets != IGNORE_INDEX).sum(dtype=SUM_DTYPE)
        self.characters = self.characters + target_chars.sum(dtype=SUM_DTYPE)

    def compute(self) -> dict[str, Tensor]:
        loss, nats_per_char = self.nats / self.tokens, self.nats / self.characters
        metrics = {"loss": loss, "perplexity": loss.exp()}
        if self.characters:
            metrics |= {
                "nats_per_char": nats_per_char,
                "bpc": nats_per_char / math.log(2),
                "characters": self.characters,
            }
        return metrics
