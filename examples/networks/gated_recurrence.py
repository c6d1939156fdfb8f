"""A gated linear recurrence in place of attention: constant memory and time per generated token.

- The state h_t = a_t h_{t-1} + (1 - a_t) u_t holds all that a layer knows of earlier tokens, a number per channel.
- The gates depend on the input only, not on the state, so training computes all positions in parallel (`scan`).
- A short convolution before it lets a layer see neighbors exactly.

Axes: B batch, T positions, C = n_embd channels, V vocabulary.

Papers: gated linear recurrences, Martin and Cundy 2018 (https://arxiv.org/abs/1709.04057), HGRN, Qin et al. 2023
(https://arxiv.org/abs/2311.04823), RG-LRU, De et al. 2024 (https://arxiv.org/abs/2402.19427), minGRU, Feng et al. 2024
(https://arxiv.org/abs/2410.01201).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.models import Net
from lmlight.models.attention import RMSNorm
from lmlight.models.kv_cache import Cache
from lmlight.models.transformer import MLP, Block


def scan(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Compute h_t = a_t h_{t-1} + b_t from a, b (B, T, C) and the state before them (B, C), in about 2 sqrt(T) steps.

    First, all chunks of about sqrt(T) positions advance together from a state of zero; then the states at their ends
    follow from one another. Decays of 0 and long products are safe: nothing is divided by them.
    """
    T = a.size(1)
    size = math.isqrt(T - 1) + 1  # ceil(sqrt(T))
    pad = -T % size
    a, b = (F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, size)) for x in (a, b))  # (B, chunks, size, C)
    decays, states = [a[:, :, 0]], [b[:, :, 0]]  # since the start of each chunk: (B, chunks, C)
    for a_t, b_t in zip(a.unbind(2)[1:], b.unbind(2)[1:]):
        states.append(torch.addcmul(b_t, a_t, states[-1]))
        decays.append(a_t * decays[-1])
    starts = [h]
    for decay, state in zip(decays[-1].unbind(1)[:-1], states[-1].unbind(1)[:-1]):
        starts.append(torch.addcmul(state, decay, starts[-1]))
    start = torch.stack(starts, 1)[:, :, None]  # (B, chunks, 1, C)
    return torch.addcmul(torch.stack(states, 2), torch.stack(decays, 2), start).flatten(1, 2)[:, :T]


class State(Cache):
    """The recurrent state of each layer, and the last inputs of its convolution."""

    def __init__(self, batch_size: int, n_layer: int, n_embd: int, conv_width: int, like: Tensor) -> None:
        super().__init__()
        self.h = [like.new_zeros(batch_size, n_embd) for _ in range(n_layer)]
        self.recent = [like.new_zeros(batch_size, conv_width - 1, n_embd) for _ in range(n_layer)]
        self.length = 0
        self.set_padding([0] * batch_size)

    def advance(self, count: int) -> None:
        self.is_padding: Tensor | None = None
        if self.length < max(self.padding):
            positions = torch.arange(self.length, self.length + count)
            self.is_padding = (positions < torch.tensor(self.padding)[:, None])[..., None].to(self.h[0].device)
        self.length += count


class Recurrence(nn.Module):
    """A short convolution, the recurrence, and an output gate; takes the arguments of `Attention`."""

    def __init__(self, n_embd: int, conv_width: int) -> None:
        super().__init__()
        self.conv = nn.Parameter(F.pad(torch.ones(n_embd), ((conv_width - 1) * n_embd, 0)))  # starts as the identity
        self.decay_bias = nn.Parameter(torch.linspace(0, 4, n_embd))  # half-lives of 1 to 38 tokens
        self.input, self.output = nn.Linear(n_embd, 3 * n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, rope: None, cache: State, layer: int) -> Tensor:
        u, decay, gate = self.input(x).chunk(3, dim=-1)  # (B, T, C) each
        if cache.is_padding is not None:
            u = u.masked_fill(cache.is_padding, 0)  # leaves the state at zero
        u = torch.cat((cache.recent[layer], u), 1)
        cache.recent[layer] = u[:, x.size(1) :]
        u = sum(tap * u[:, k : k + x.size(1)] for k, tap in enumerate(self.conv.view(-1, x.size(-1))))
        a = torch.sigmoid(decay + self.decay_bias)
        h = scan(a, (1 - a) * u, cache.h[layer])
        cache.h[layer] = h[:, -1]
        return self.output(h * F.silu(gate))


class GatedRecurrence(Net):
    """A transformer with recurrences in place of attention.

    Args:
        vocab_size: V.
        block_size: length of the training windows, in tokens. Generated texts may be longer.
        n_layer: number of blocks.
        n_embd: width of the residual stream, and size of each layer's state.
        conv_width: tokens that the convolution sees, at least 2.
    """

    def __init__(self, vocab_size: int, block_size: int, n_layer: int = 4, n_embd: int = 128, conv_width: int = 4):
        super().__init__()
        self.sizes = n_layer, n_embd, conv_width
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList()
        for _ in range(n_layer):
            mlp = MLP(n_embd, 4 * n_embd, "relu2", dropout=0.0, bias=False)
            self.blocks.append(Block(Recurrence(n_embd, conv_width), mlp, RMSNorm(n_embd), RMSNorm(n_embd)))
        self.norm, self.head = RMSNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # blocks start as the identity
                nn.init.normal_(parameter, std=0.0 if name.endswith(("output.weight", "down.weight")) else 0.02)

    def forward(self, idx: Tensor, cache: State | None = None) -> Tensor:
        cache = self.make_cache(len(idx)) if cache is None else cache
        cache.advance(idx.size(1))
        x = self.embedding(idx)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, None, cache, layer)
        return self.head(self.norm(x[:, -1:] if cache.last_only else x))

    def make_cache(self, batch_size: int) -> State:
        return State(batch_size, *self.sizes, like=self.head.weight)
