"""How the next token is chosen: the settings, the logits processors and the draw.

- Processors run in the order of the Hugging Face libraries (repetition penalty, temperature, top-k, top-p, min-p), so that
  values carry over.
- A token is drawn by inverting the cumulative distribution at a random number. With one number per token from a row's own
  generator, its text does not depend on what else is in the batch.

Axes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmlight.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How text is sampled.

    Args:
        max_new_tokens: maximum number of tokens to generate.
        temperature: divides the logits. Below 1 favors likely tokens; 0 always takes the likeliest (greedy decoding).
        top_k: keep only the `top_k` likeliest tokens.
        top_p: keep the likeliest tokens that together reach this probability (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751).
        min_p: keep tokens whose probability is at least `min_p` times that of the likeliest (Nguyen et al. 2024,
            https://arxiv.org/abs/2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens that have occurred (Keskar et al. 2019,
            https://arxiv.org/abs/1909.05858). 1 disables it; above 1 repeats less.
        stop: stop strings. Generation ends before the first one. A line break in one matches `\\n` and `\\r\\n`.
        end_at_line: once 80% of `max_new_tokens` have been generated, end at the next line break that does not follow a
            colon, a space or another line break.
        num_samples: samples per prompt. The first uses `seed`, the next `seed` + 1, and so on.
        seed: random seed.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = 0.1
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    end_at_line: bool = True
    num_samples: int = 1
    seed: int = 1337

    def __post_init__(self) -> None:
        strings = not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop)
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("stop", strings, "a list of non-empty strings"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("seed", -(2**63) <= self.seed <= 2**64 - self.num_samples, "a 64-bit integer"),
        ):
            if not valid:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def apply_repetition_penalty(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """Penalize tokens that already occur: change the logits (B, V) where the boolean `present` (B, V) is True."""
    return torch.where(present, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply the temperature to logits (B, V), and set those that top-k, top-p or min-p removes to -inf."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens together
        ordered = ordered.masked_fill(before >= sampling.top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    if sampling.min_p:
        likeliest = logits.amax(-1, keepdim=True)
        logits = logits.masked_fill(logits < likeliest + math.log(sampling.min_p), -math.inf)
    return logits


def sample_one_token(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draw a token per row by inverting the cumulative distribution.

    Args:
        logits: (B, V).
        sampling: filters and temperature.
        uniform: (B, 1) random numbers in [0, 1).

    Returns:
        (B, 1) ids.
    """
    if sampling.temperature < 1e-6:  # dividing by it may overflow
        return logits.argmax(-1, keepdim=True)
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():  # CUDA has no deterministic cumsum
        return sample_one_token(logits.cpu(), sampling, uniform.cpu()).to(logits.device)
    cumulative = filter_logits(logits, sampling).softmax(-1).to(uniform.dtype).cumsum(-1)
    # rounding may leave the total below 1; tokens of probability 0 are never drawn
    ids = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return ids.clamp_(max=logits.size(-1) - 1)
