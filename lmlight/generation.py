"""The next token, again and again: logits filters, sampling, and streams of text. Works with any net of `models`.

- The prompt is one forward pass; each further token costs one token's work, through the net's cache.
- Filters run in the order of the Hugging Face ecosystem (repetition penalty, temperature, top-k, top-p, min-p), so that
  values carry over.
- A stream's random numbers follow from its own seed alone: one for each token, turned into a token by the inverse of the
  distribution function. So a text does not depend on what else is in the batch, and nobody else's numbers are moved.
- Beyond `block_size` see `Sampling.exact_window`.

Axes: B streams, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lmlight.data.tokenizer import CONTROL_CHARACTERS, StreamingDecoder, Tokenizer
from lmlight.errors import UserError
from lmlight.models.base import Cache, Net, Weights


@dataclass(frozen=True)
class Sampling:
    """How text is sampled.

    Args:
        max_new_tokens: tokens added to the prompt.
        temperature: divides the logits; below 1 is bolder towards the likely, 0 always takes the likeliest.
        top_k: keep the so many likeliest tokens.
        top_p: keep the likeliest tokens that together hold this much probability (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751).
        min_p: keep the tokens at least this many times as likely as the likeliest (Nguyen et al. 2024,
            https://arxiv.org/abs/2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of the tokens that are already there (Keskar et
            al. 2019, https://arxiv.org/abs/1909.05858); 1 is none, above 1 repeats less.
        stop: end where one of these texts has been written; it is not part of what is given back. A line break in it matches
            `\\n` and `\\r\\n`.
        num_samples: texts for each prompt, the first with `seed`, the next with `seed` + 1, and so on.
        exact_window: beyond the net's `block_size`, give it the last `block_size` tokens anew for each token, which costs as
            much as that. Else a net with rotary positions keeps what it knows of the last `block_size` tokens, which knew
            of earlier ones in turn; one with learned positions, which end there, begins anew with the later half.
        seed: of the random numbers.
        weights: how the matrices are read for each new token: `full`, as they are; `int8`, rounded, which on a CPU makes a
            single text nearly twice as fast, at no measured loss (docs/generation.md). Prompts see the full ones.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    num_samples: int = 1
    exact_window: bool = False
    seed: int = 1337
    weights: Weights = "full"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be a list of texts that are not empty, got {self.stop!r}")
        if self.num_samples < 1:
            raise UserError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.weights not in get_args(Weights):
            raise UserError(f"weights must be one of {', '.join(get_args(Weights))}, got {self.weights!r}")


def apply_repetition_penalty(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of the tokens that are `present`, boolean (B, V), moved away."""
    return torch.where(present, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
    if sampling.min_p:
        likeliest = logits.amax(-1, keepdim=True)
        logits = logits.masked_fill(logits < likeliest + math.log(sampling.min_p), -math.inf)
    return logits


def sample_one_token(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """(B, V) logits and (B, 1) numbers in [0, 1) to (B, 1) ids: where the distribution function passes the number."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():  # CUDA has no deterministic cumsum
        return sample_one_token(logits.cpu(), sampling, uniform.cpu()).to(logits.device)
    cumulative = filter_logits(logits, sampling).softmax(-1).to(uniform.dtype).cumsum(-1)
    # the last of the function is 1 but for rounding; a token of no probability adds nothing, so it is never passed at
    ids = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return ids.clamp_(max=logits.size(-1) - 1)


class Step(NamedTuple):
    """One more token of each stream.

    Attributes:
        ids: (B,) the tokens.
        logits: (B, V) what the net said before any filter.
    """

    ids: list[int]
    logits: Tensor


@torch.inference_mode()
def generate_ids(
    net: Net, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[Step]:
    """Continues token sequences side by side, each as if it were alone.

    Args:
        net: used as it is; put it into `eval()` first, or dropout takes part.
        prompts: B sequences of at least one id each, of any lengths; the last `block_size` ids count.
        sampling: how, and how much; its seed and `num_samples` are not looked at.
        seeds: of each sequence.

    Yields:
        each step; `max_new_tokens` of them.
    """
    assert all(prompts), "a sequence begins with at least one token"
    device = next(net.parameters()).device
    ids = [list(prompt) for prompt in prompts]
    number = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    uniforms = torch.stack(
        [
            torch.rand(sampling.max_new_tokens, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    ).to(device, number)
    present = torch.zeros(len(ids), net.vocab_size, dtype=torch.bool, device=device)
    if sampling.repetition_penalty != 1:
        for row, prompt in enumerate(prompts):
            present[row, list(prompt)] = True
    cache, logits = prefill(net, [row[-net.block_size :] for row in ids], sampling.weights)
    for step in range(sampling.max_new_tokens):
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        wanted = logits
        if sampling.repetition_penalty != 1:
            wanted = apply_repetition_penalty(logits, present, sampling.repetition_penalty)
        tokens = sample_one_token(wanted, sampling, uniforms[:, step : step + 1])
        if sampling.repetition_penalty != 1:
            present.scatter_(1, tokens, True)
        new: list[int] = tokens[:, 0].tolist()
        for sequence, index in zip(ids, new):
            sequence.append(index)
        yield Step(new, logits)
        if step + 1 < sampling.max_new_tokens:
            logits = decode_one_token(net, cache, ids, tokens, sampling.exact_window)


def prefill(net: Net, ids: list[list[int]], weights: Weights = "full") -> tuple[Cache, Tensor]:
    """A cache that has seen these sequences, in one forward pass, and the (B, V) logits of what follows each."""
    lengths = [len(row) for row in ids]
    longest = max(lengths)
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=next(net.parameters()).device)
    cache = net.new_cache(len(ids), weights)
    return cache, net.extend(padded, cache, lengths)


def decode_one_token(net: Net, cache: Cache, ids: list[list[int]], tokens: Tensor, exact_window: bool) -> Tensor:
    """(B, V) logits of what follows `tokens` (B, 1), the last of `ids`."""
    full = [row for row, length in enumerate(cache.lengths) if length >= net.block_size]
    if not full or (net.slides and not exact_window):
        return net.extend(tokens, cache)
    kept = net.block_size if exact_window else max(1, net.block_size // 2)
    fresh, logits_of_full = prefill(net, [ids[row][-kept:] for row in full])
    if len(full) == len(ids):
        cache.replace(full, fresh)
        return logits_of_full
    for row in full:  # whatever they write now is replaced
        cache.lengths[row] = 0
    logits = net.extend(tokens, cache)
    cache.replace(full, fresh)
    logits[full] = logits_of_full
    return logits


def generate(net: Net, idx: Tensor, sampling: Sampling) -> Tensor:
    """Continues token sequences of one length.

    Args:
        net: used as it is; put it into `eval()` first, or dropout takes part.
        idx: (B, T) ids with T at least 1.
        sampling: how, and how much. Row i takes the seed `sampling.seed` + i; `stop` and `num_samples` are for texts.

    Returns:
        (B, T + max_new_tokens) ids, beginning with `idx`.
    """
    seeds = [sampling.seed + row for row in range(len(idx))]
    new = [step.ids for step in generate_ids(net, idx.tolist(), sampling, seeds)]
    made = torch.tensor(new, dtype=idx.dtype, device=idx.device).reshape(len(new), len(idx)).T
    return torch.cat((idx, made), dim=1)


class TextStream:
    """A text as it is written.

    Args:
        tokenizer: encodes the prompt, decodes the rest.
        prompt: what it continues, encoded with the line endings of the training text (`Tokenizer.encode_prompt`). An empty
            one begins a document where the tokenizer knows of documents, else as if a line had just ended.
        sampling: gives the stop texts.
        seed: of its random numbers.

    Attributes:
        prompt: as given.
        seed: as given.
        ids: the prompt's ids.
        text: what has been written, without the prompt and the stop text.
        tokens: the ids written, to the one that completed the stop text.
        logprobs: the natural logarithm of the probability that the net gave to each, before any filter, if asked for.
        finish_reason: `length`; `stop`, at a stop text or the end of the document; or None while it is being written.

    Raises:
        UserError: the prompt has a character that the tokenizer does not know.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, sampling: Sampling, seed: int) -> None:
        self.prompt, self.seed = prompt, seed
        self._end_of_text = tokenizer.eos_id
        self.ids = tokenizer.encode_prompt(prompt) or tokenizer.bos_ids
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: Literal["length", "stop"] | None = None
        self._stop = [
            *dict.fromkeys(re.sub("\r?\n", newline, text) for text in sampling.stop for newline in ("\n", "\r\n"))
        ]
        self._held = ""  # the beginning, perhaps, of a stop text
        self._detokenizer = StreamingDecoder(tokenizer, self.ids if prompt else ())

    def push(self, index: int) -> str:
        """Adds a token; gives the text that has become certain."""
        self.tokens.append(index)
        text = self._release(self._detokenizer.push(index))
        if index == self._end_of_text and self.finish_reason is None:
            self.finish_reason = "stop"
            text, self.text = text + self._held, self.text + self._held
        return text

    def end(self) -> str:
        """No more tokens will come; gives the rest of the text."""
        rest = self._release(self._detokenizer.flush())
        if self.finish_reason is None:
            self.finish_reason = "length"
            self.text += self._held
            rest += self._held
        return rest

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            text, self.finish_reason = text[: min(found)], "stop"
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def start_streams(tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling) -> list[TextStream]:
    """The streams that `generate_text` is to fill: `sampling.num_samples` for each prompt, one after the other."""
    return [
        TextStream(tokenizer, prompt, sampling, sampling.seed + sample)
        for prompt in prompts
        for sample in range(sampling.num_samples)
    ]


def generate_text(
    net: Net, streams: Sequence[TextStream], sampling: Sampling, logprobs: bool = False
) -> Iterator[tuple[TextStream, str]]:
    """Writes texts side by side, each as if it were alone.

    Args:
        net: used as it is; put it into `eval()` first, or dropout takes part.
        streams: from `start_streams`; finished at the end.
        sampling: how, and how much.
        logprobs: note each token's log-probability.

    Yields:
        a stream and its next piece of text, as it comes; a stream's pieces, joined, are its `text`.
    """
    if not streams:
        return
    seeds = [stream.seed for stream in streams]
    for step in generate_ids(net, [stream.ids for stream in streams], sampling, seeds):
        noted = None
        if logprobs:
            chosen = torch.tensor(step.ids, device=step.logits.device)[:, None]
            noted = step.logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
        for row, stream in enumerate(streams):
            if stream.finish_reason is None:
                if noted is not None:
                    stream.logprobs.append(noted[row])
                if piece := stream.push(step.ids[row]):
                    yield stream, piece
        if all(stream.finish_reason for stream in streams):
            return
    for stream in streams:
        if stream.finish_reason is None and (piece := stream.end()):
            yield stream, piece


def escape_control_characters(text: str, after: str = "") -> str:
    """Makes text safe to print: control characters, which could move the cursor, show as escapes such as `\\x1b`.

    Args:
        text: printed as it is but for line endings, which all become `\\n`, and control characters other than tabs.
        after: what has been printed before, where text comes in pieces. A `\\r\\n` split between two is one line break.
    """
    if after.endswith("\r"):
        text = text.removeprefix("\n")
    lines = re.sub("\r\n?", "\n", text)
    return CONTROL_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], lines)
