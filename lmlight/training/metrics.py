"""Figures of merit that compare across tokenizers: nats and bits per character.

Totals are added up exactly and divided once, at the end, after one sum over the ranks; a mean of batch means would
weigh a short last batch like a full one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lmlight.data.loader import IGNORE_INDEX

# Apple's MPS has no float64; there, sums of some hundred thousand losses in float32 are good to 5 digits.
SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


class TextLoss(Metric):
    """The loss of a net over a text, per token and per character.

    `compute` gives `loss` (nats per token), `perplexity` (its exponential), `nats_per_char`, `bpc` (bits per character)
    and `characters` (how many were scored).
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "characters"):
            self.add_state(name, torch.zeros((), dtype=SUM_DTYPE), dist_reduce_fx="sum")
        self.nats: Tensor
        self.tokens: Tensor
        self.characters: Tensor

    def update(self, losses: Tensor, targets: Tensor, target_chars: Tensor) -> None:
        """Adds a batch.

        Args:
            losses: (B, T) nats; 0 where unscored.
            targets: (B, T) token ids; `IGNORE_INDEX` ones do not count.
            target_chars: (B, T) the characters that the targets stand for; 0 where unscored.
        """
        self.nats = self.nats + losses.sum(dtype=SUM_DTYPE)
        # in SUM_DTYPE too: precision bf16-true makes the states bfloat16, which does not count beyond 256
        self.tokens = self.tokens + (targets != IGNORE_INDEX).sum(dtype=SUM_DTYPE)
        self.characters = self.characters + target_chars.sum(dtype=SUM_DTYPE)

    def compute(self) -> dict[str, Tensor]:
        loss, nats_per_char = self.nats / self.tokens, self.nats / self.characters
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "nats_per_char": nats_per_char,
            "bpc": nats_per_char / math.log(2),
            "characters": self.characters,
        }
