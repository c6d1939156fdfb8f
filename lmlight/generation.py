"""The next token, again and again: logits filters, sampling, the loop. Works with any net of `models`.

Filters run in the order of the Hugging Face ecosystem (temperature, top-k, top-p), so that settings carry over. Random
numbers come from a generator of the stream's own: sampling moves nobody else's, and a seed gives the same text again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmlight.errors import UserError
from lmlight.models.base import Net


@dataclass(frozen=True)
class Sampling:
    """How text is sampled.

    Args:
        max_new_tokens: tokens added to the prompt.
        temperature: divides the logits; below 1 is bolder towards the likely, 0 always takes the likeliest.
        top_k: keep the so many likeliest tokens.
        top_p: keep the likeliest tokens that together hold this much probability (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751).
        seed: of the random numbers.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) as they are sampled from: tempered, and -inf where a filter takes a token out."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        weakest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the mass of all likelier tokens
        ordered = ordered.masked_fill(before >= sampling.top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return logits


def sample_one_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, V) logits to (B, 1) ids."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return filter_logits(logits, sampling).softmax(-1).multinomial(1, generator=generator)


@torch.inference_mode()
def generate(net: Net, idx: Tensor, sampling: Sampling) -> Tensor:
    """Continues token sequences.

    Args:
        net: used as it is; put it into `eval()` first, or dropout takes part.
        idx: (B, T) ids with T at least 1. Beyond the net's `block_size`, the context is its last `block_size` tokens.
        sampling: how, and how much.

    Returns:
        (B, T + max_new_tokens) ids, beginning with `idx`.
    """
    assert idx.size(1) > 0, "a sequence begins with at least one token"
    generator = torch.Generator().manual_seed(sampling.seed)  # on the CPU: the same numbers on every device
    for _ in range(sampling.max_new_tokens):
        logits = net(idx[:, -net.block_size :])[:, -1]  # (B, V)
        token = sample_one_token(logits.float().cpu(), sampling, generator)
        idx = torch.cat((idx, token.to(idx.device)), dim=1)
    return idx
