"""Decoding with any network: everything that exists only while generating.

- The prompt is one forward pass; each further token is one step, in `FastDecoder` if it supports the network.
- A network without a cache recomputes its window, the last `block_size` tokens, at each step.
- Beyond `block_size`, a cache drops the oldest token at each step if positions are rotary. Learned ones end there, so a full
  row restarts from the later half of its window.
- Each row has its own random generator, so its text does not depend on what else is in the batch.

Axes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmlight.generation.cuda_graph import CudaGraphDecoder
from lmlight.generation.fast_decoder import FastDecoder
from lmlight.generation.sampling import Sampling, apply_repetition_penalty, sample_one_token
from lmlight.models import Net
from lmlight.models.kv_cache import Cache, KeyValueCache

# Capturing a CUDA graph takes as long as several steps, and a restart needs another one.
RECORD_AFTER = 8


class Decoder:
    """Computes next-token logits (B, V) for growing rows of tokens.

    Args:
        net: used in its current mode: call `eval()` first, or dropout is active.
        batch_size: B.
    """

    def __init__(self, net: Net, batch_size: int) -> None:
        self.net, self.batch_size = net, batch_size
        self.cache: Cache | None = None
        self._window: Tensor
        self._lengths: list[int] = []  # of the rows in the window, without padding
        # not `net` itself: a compiled network would be compiled again for each length
        self._forward: Callable[..., Tensor] = net.forward
        self._fast: FastDecoder | None = None
        self._graph: CudaGraphDecoder | None = None
        self._plain_steps = 0  # with the present cache

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Process B prompts of at least one id each in one pass. Only the last `block_size` ids of a prompt are used."""
        return self._start([list(prompt)[-self.net.block_size :] for prompt in prompts])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (B, 1) to each row."""
        if self.cache is not None and not self.cache.supports_sliding_window:
            self._restart_full_rows()
        if self.cache is None or not self.cache.supports_sliding_window:
            self._window = torch.cat((self._window, tokens), 1)[:, -self.net.block_size :]
            self._lengths = [min(length + 1, self.net.block_size) for length in self._lengths]
        if self.cache is None:
            return self._recompute()
        if self._fast is None and FastDecoder.supports(self.net):
            self._fast = FastDecoder(self.net, self.batch_size)
        if self._fast is not None:
            return self._fast_step(tokens, self.cache, self._fast)
        return self._forward(tokens, cache=self.cache)[:, -1]

    def _fast_step(self, tokens: Tensor, cache: Cache, fast: FastDecoder) -> Tensor:
        if self._graph is not None:
            return self._graph(tokens)
        self._plain_steps += 1
        logits = fast(tokens, cache)
        if tokens.is_cuda and isinstance(cache, KeyValueCache) and self._plain_steps == RECORD_AFTER:
            self._graph = CudaGraphDecoder(fast, cache)
        return logits

    def _start(self, rows: list[list[int]]) -> Tensor:
        self._lengths = [len(row) for row in rows]
        padding = [max(self._lengths) - length for length in self._lengths]
        device = next(self.net.parameters()).device
        padded = [[0] * pad + row for pad, row in zip(padding, rows)]
        self._window = torch.tensor(padded, dtype=torch.long, device=device)  # (B, T)
        self.cache = self._graph = None  # frees the old buffers first
        self.cache, self._plain_steps = self.net.make_cache(self.batch_size), 0
        if self.cache is None:
            return self._recompute()
        self.cache.set_padding(padding)
        self.cache.last_only = True
        if not max(self._lengths):  # no token is kept if block_size is at most 3
            return self._window
        return self._forward(self._window, cache=self.cache)[:, -1]

    def _recompute(self) -> Tensor:
        B, T = self._window.shape
        device = self._window.device
        lengths = torch.tensor(self._lengths, device=device)
        columns = (torch.arange(T, device=device) - lengths[:, None]) % T  # moves the padding to the end
        logits = self._forward(self._window.gather(1, columns))  # (B, T, V)
        return logits[torch.arange(B, device=device), lengths - 1]

    def _restart_full_rows(self) -> None:
        """Prefill again if a row is full: full rows with the later half of their window, the others with all of it."""
        block_size = self.net.block_size
        if max(self._lengths) < block_size:
            return
        kept = [length if length < block_size else max(0, block_size // 2 - 1) for length in self._lengths]
        self._start([row[len(row) - count :] for row, count in zip(self._window.tolist(), kept)])


class GenerationStep(NamedTuple):
    """One more token in each row: the B ids, and the network's logits (B, V) before any logits processor."""

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
        sampling: `seed`, `num_samples`, `stop` and `end_at_line` are ignored.
        seeds: a random seed per sequence.

    Yields:
        `max_new_tokens` steps.
    """
    assert all(prompts), "a prompt has at least one token"
    device = next(net.parameters()).device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    uniforms = torch.stack(
        [
            # not the default dtype: `predict` under bf16-true changes that
            torch.rand(sampling.max_new_tokens, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    ).to(device, dtype)
    penalty, present = sampling.repetition_penalty, torch.zeros(len(prompts), net.vocab_size, dtype=torch.bool)
    if penalty != 1:
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
        if penalty != 1:
            present.scatter_(1, tokens, True)
        yield GenerationStep(tokens[:, 0].tolist(), logits)
        if step + 1 < sampling.max_new_tokens:
            logits = decoder.step(tokens)


def generate(net: Net, idx: Tensor, sampling: Sampling) -> Tensor:
    """Continue sequences of token ids that all have the same length.

    Args:
        net: used in its current mode: call `eval()` first, or dropout is active.
        idx: (B, T) ids with T at least 1.
        sampling: row i uses `seed` + i; `num_samples`, `stop` and `end_at_line` are ignored.

    Returns:
        (B, T + max_new_tokens) ids, starting with `idx`.
    """
    seeds = [sampling.seed + row for row in range(len(idx))]
    steps = [step.ids for step in generate_ids(net, idx.tolist(), sampling, seeds)]
    new = torch.tensor(steps, dtype=idx.dtype, device=idx.device).reshape(len(steps), len(idx)).T
    return torch.cat((idx, new), dim=1)
