"""Decoding with any network: everything that exists only while generating.

- The prompt is one forward pass (`prefill`); each further token is one step.
- A network with a cache appends to it. One without recomputes its window, the last `block_size` tokens.
- Beyond `block_size`, a cache of rotary positions drops the oldest token at each step. Learned positions end there: the
  row restarts from the later half of its window.
- Each row has its own random generator, so a text does not depend on what else is in the batch, and global generators are
  not touched.

Axes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmlight.generation.fast_decoder import FastDecoder
from lmlight.generation.sampling import Sampling, apply_repetition_penalty, sample_one_token
from lmlight.models import Net
from lmlight.models.kv_cache import KeyValueCache


class Decoder:
    """Computes next-token logits for rows of tokens that grow.

    Args:
        net: used in its current mode: call `eval()` first, or dropout is active.
        batch_size: B.
    """

    def __init__(self, net: Net, batch_size: int) -> None:
        self.net, self.cache = net, net.make_cache(batch_size)
        # not a call, which a compiled network would compile for each length
        self._forward: Callable[..., Tensor] = net.forward
        self._device = next(net.parameters()).device
        self._fast: FastDecoder | None = None

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Process the prompts in one forward pass.

        Args:
            prompts: B sequences of at least one id each, of any lengths; the last `block_size` ids count.

        Returns:
            (B, V) logits for the token after each prompt.
        """
        rows = [list(prompt)[-self.net.block_size :] for prompt in prompts]
        lengths = [len(row) for row in rows]
        padded = [[0] * (max(lengths) - len(row)) + row for row in rows]
        self._window = torch.tensor(padded, device=self._device)  # (B, T), padded at the start
        self._lengths = torch.tensor(lengths, device=self._device)[:, None]  # (B, 1)
        logits = self._forward_window()
        if self.cache is not None:
            self.cache.set_lengths(lengths)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row.

        Args:
            tokens: (B, 1) ids, on the device of the network.

        Returns:
            (B, V) logits for the token after it.
        """
        cache, block_size = self.cache, self.net.block_size
        if cache is None or not cache.supports_sliding_window:
            if cache is not None:
                self._restart_full_rows(cache)
            self._window = torch.cat((self._window, tokens), 1)[:, -block_size:]
            self._lengths = (self._lengths + 1).clamp(max=block_size)
        if cache is None:
            return self._forward_window()
        if self._fast is None and FastDecoder.supports(self.net):
            self._fast = FastDecoder(self.net, len(tokens))
        if self._fast is not None:
            return self._fast(tokens, cache)
        return self._forward(tokens, cache=cache)[:, -1]

    def _forward_window(self) -> Tensor:
        rows = torch.arange(len(self._window), device=self._device)
        columns = torch.arange(self._window.size(1), device=self._device) - self._lengths
        idx = self._window.gather(1, columns % self._window.size(1))  # (B, T), padded at the end
        last = self._lengths[:, 0] - 1
        if self.cache is None:
            return self._forward(idx)[rows, last]
        return self._forward(idx, cache=self.cache, last=last)

    def _restart_full_rows(self, cache: KeyValueCache) -> None:
        """Empty the cache of rows that are full, but for the later half of the block less the token to come."""
        full = [row for row, length in enumerate(cache.lengths) if length >= self.net.block_size]
        if not full:
            return
        fresh, kept = Decoder(self.net, len(full)), self.net.block_size // 2 - 1
        assert fresh.cache is not None
        if kept > 0:
            fresh.prefill(self._window[full, -kept:].tolist())
        cache.replace(full, fresh.cache)


class GenerationStep(NamedTuple):
    """One more token in each row.

    Attributes:
        ids: the B tokens.
        logits: (B, V) output of the network, before any processor.
    """

    ids: list[int]
    logits: Tensor


@torch.inference_mode()
def generate_ids(
    net: Net, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[GenerationStep]:
    """Continue sequences of token ids side by side.

    Args:
        net: used in its current mode: call `eval()` first, or dropout is active.
        prompts: B sequences of at least one id each, of any lengths; the network sees the last `block_size` ids.
        sampling: `seed`, `num_samples` and `stop` are ignored.
        seeds: a random seed per sequence.

    Yields:
        one step for each of `max_new_tokens` tokens.
    """
    assert all(prompts), "a prompt has at least one token"
    device = next(net.parameters()).device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    uniforms = torch.stack(
        [torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(device, dtype)
    penalty, present = sampling.repetition_penalty, torch.zeros(len(prompts), net.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        present[row, list(prompt)] = True
    present = present.to(device)
    decoder = Decoder(net, len(prompts))
    logits = decoder.prefill(prompts)
    for step in range(sampling.max_new_tokens):
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        penalized = logits if penalty == 1 else apply_repetition_penalty(logits, present, penalty)
        tokens = sample_one_token(penalized, sampling, uniforms[:, step : step + 1])  # (B, 1)
        present.scatter_(1, tokens, True)
        yield GenerationStep(tokens[:, 0].tolist(), logits)
        if step + 1 < sampling.max_new_tokens:
            logits = decoder.step(tokens)


def generate(net: Net, idx: Tensor, sampling: Sampling) -> Tensor:
    """Continue sequences of token ids of one length.

    Args:
        net: used in its current mode: call `eval()` first, or dropout is active.
        idx: (B, T) ids with T at least 1.
        sampling: row i uses the seed `sampling.seed` + i. `stop` and `num_samples` are ignored.

    Returns:
        (B, T + max_new_tokens) ids, starting with `idx`.
    """
    seeds = [sampling.seed + row for row in range(len(idx))]
    steps = [step.ids for step in generate_ids(net, idx.tolist(), sampling, seeds)]
    new = torch.tensor(steps, dtype=idx.dtype, device=idx.device).reshape(len(steps), len(idx)).T
    return torch.cat((idx, new), dim=1)
