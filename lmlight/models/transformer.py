"""The decoder-only transformer, from small to whole: norm, MLP, block, net. Its attention is in `attention.py`.

- Pre-norm residual blocks.
- The options are those of stock architectures, so that a trained net can be exported: `GPT2` and `LLAMA` are presets.
- The same arithmetic is written down four times, and tests hold all of it equal: `features`, for training; `attention_maps`,
  which shows the weights; `decoding.OneToken`, for speed; `export.graph.CachedGraph`, for other engines.

Axes: B rows, T positions, C = n_embd channels, D channels of a head, V vocabulary.

Papers: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); pre-norm GPT-2, Radford et al. 2019; RMSNorm, Zhang and
Sennrich 2019 (https://arxiv.org/abs/1910.07467); SwiGLU, Shazeer 2020 (https://arxiv.org/abs/2002.05202); ReLU², So et al.
2021 (https://arxiv.org/abs/2109.08668).
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.errors import UserError
from lmlight.models.attention import NORM_EPS, Attention, attention_weights, drop, repeat_heads, rotary_table
from lmlight.models.base import Cache, Net, Weights, init_kwargs
from lmlight.models.decoding import OneToken
from lmlight.models.kv_cache import KeyValueCache

# From so many logits on (half a gigabyte in float32) the loss is computed in chunks that are not kept, from torch 2.13 on.
CHUNKED_LOSS_MIN_LOGITS = 2**27

GPT2: dict[str, Any] = dict(norm="layernorm", positions="learned", mlp="gelu", qk_norm=False, bias=True, tie=True)
"""`Transformer` arguments that give GPT-2's architecture; sizes are added to them."""
LLAMA: dict[str, Any] = dict(norm="rmsnorm", positions="rotary", mlp="swiglu", qk_norm=False, bias=False, tie=False)
"""`Transformer` arguments that give Llama's architecture; with `qk_norm`, Qwen3's."""

NormName = Literal["rmsnorm", "layernorm"]


def make_norm(name: NormName, size: int, bias: bool) -> nn.Module:
    return nn.RMSNorm(size, eps=NORM_EPS) if name == "rmsnorm" else nn.LayerNorm(size, eps=NORM_EPS, bias=bias)


def usual_hidden(kind: str, n_embd: int) -> int:
    """How wide an MLP's hidden layer is where nothing else is said.

    The gate is a third matrix: 8/3 in place of 4 keeps the number of weights, in eights for the hardware's sake.
    """
    return 8 * round(n_embd / 3) if kind == "swiglu" else 4 * n_embd


class MLP(nn.Module):
    """What each position does with what it has gathered; the hidden layer is 4 C wide, or 8/3 C with a gate."""

    def __init__(
        self,
        n_embd: int,
        kind: Literal["gelu", "relu2", "swiglu"],
        dropout: float,
        bias: bool,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.dropout = kind, dropout
        self.hidden = hidden or usual_hidden(kind, n_embd)
        self.up = nn.Linear(n_embd, 2 * self.hidden if kind == "swiglu" else self.hidden, bias=bias)
        self.down = nn.Linear(self.hidden, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return drop(self.down(self.activate(self.up(x))), self.dropout, self.training)

    def activate(self, h: Tensor) -> Tensor:
        """What is between the two products: (..., hidden), or gate and value side by side, to (..., hidden)."""
        if self.kind == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            return F.silu(gate) * value
        if self.kind == "relu2":
            return F.relu(h).square()
        return F.gelu(h, approximate="tanh")  # GPT-2's


class Block(nn.Module):
    """Communication, then computation, each added to a residual stream that passes untouched."""

    def __init__(self, attention: Attention, mlp: MLP, attention_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, rotary: Tensor | None, cache: tuple[KeyValueCache, int] | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary=rotary, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(Net):
    """A decoder-only transformer.

    Args:
        vocab_size: V.
        block_size: the longest context.
        n_layer: blocks.
        n_head: attention heads in a block; must divide `n_embd`.
        n_embd: width of the residual stream.
        n_kv_head: heads of keys and values (grouped-query attention); must divide `n_head`. Null is as many as `n_head`.
        dropout: after the embedding, in attention and after each half of a block.
        norm: RMSNorm, or LayerNorm.
        positions: rotary, turning queries and keys; or a learned vector for each position, added to the token's.
        mlp: GELU or ReLU² with a hidden layer of 4 n_embd, or SwiGLU with 8/3 n_embd and a gate.
        qk_norm: normalise queries and keys.
        bias: in linear maps and LayerNorm.
        tie: use the token embedding as the output layer too.
        n_hidden: width of the MLP's hidden layer, where it is not to be the usual one. Null is.

    Raises:
        UserError: a size that is not positive, or sizes that do not fit each other.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        norm: NormName = "rmsnorm",
        positions: Literal["rotary", "learned"] = "rotary",
        mlp: Literal["gelu", "relu2", "swiglu"] = "relu2",
        qk_norm: bool = True,
        bias: bool = False,
        tie: bool = False,
        n_hidden: int | None = None,
    ) -> None:
        super().__init__(init_kwargs(locals()))
        _check_sizes(n_layer, n_head, n_embd, n_kv_head, n_hidden, dropout, positions)
        self.n_kv_head, self.head_size, self.dropout = n_kv_head or n_head, n_embd // n_head, dropout
        self.n_hidden = n_hidden or usual_hidden(mlp, n_embd)
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd) if positions == "learned" else None
        rotary = rotary_table(block_size, self.head_size) if positions == "rotary" else None
        self.register_buffer("rotary", rotary, persistent=False)
        self.rotary: Tensor | None
        self.blocks = nn.ModuleList(
            Block(
                Attention(n_embd, n_head, n_kv_head, dropout, bias, qk_norm),
                MLP(n_embd, mlp, dropout, bias, n_hidden),
                make_norm(norm, n_embd, bias),
                make_norm(norm, n_embd, bias),
            )
            for _ in range(n_layer)
        )
        self.norm = make_norm(norm, n_embd, bias)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of 0.02, as GPT-2's, and zeros where a branch joins the stream: each begins by changing nothing."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                joins = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.0 if joins else 0.02)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(self.features(idx))  # (B, T, V)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        if idx.numel() * self.vocab_size < CHUNKED_LOSS_MIN_LOGITS or not hasattr(F, "linear_cross_entropy"):
            return super().loss(idx, targets)
        x, weight = self.features(idx).flatten(0, 1), self.head.weight
        if torch.is_autocast_enabled(x.device.type):  # which does not know this function
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        # not its own mean, which adds up the chunks in the type of x: in bfloat16 that is off by up to 0.5 nats
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, 2**25 // self.vocab_size))  # 128 MiB of logits
        return F.linear_cross_entropy(x, weight, targets.flatten(), reduction="none", options=options).float().mean()

    def features(self, idx: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T) ids to the (B, T, C) of which `head` makes the logits."""
        T = idx.size(1)
        assert self.block_size >= T, f"{T} positions, block_size {self.block_size}"
        if cache is not None:
            cache.place(T)
        positions = slice(0, T) if cache is None else cache.positions
        x = drop(self._embed(idx, positions), self.dropout, self.training)
        rotary = None if self.rotary is None else self.rotary_at(positions, cache)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, None if cache is None else (cache, layer))
        return self.norm(x)

    def attention_maps(self, idx: Tensor) -> Tensor:
        """How much each position attends to each other one, in every block and head: (B, T) ids to (L, B, H, T, T).

        For looking: it computes beside the fused path what that never writes down. Rows add up to 1; above the diagonal
        all is 0.
        """
        positions = slice(0, idx.size(1))
        x, maps = self._embed(idx, positions), []
        rotary = None if self.rotary is None else self.rotary_at(positions, None)
        for block in cast("list[Block]", self.blocks):
            q, k, _ = block.attention.project(block.attention_norm(x), rotary=rotary)
            maps.append(attention_weights(q, repeat_heads(k, q.size(1) // k.size(1)), causal=True))
            x = block(x, rotary)
        return torch.stack(maps)

    def _embed(self, idx: Tensor, positions: slice | Tensor) -> Tensor:
        x = self.embedding(idx)  # (B, T, C)
        return x if self.positions is None else x + self.positions.weight[positions]

    @torch.no_grad()
    def extend(self, idx: Tensor, cache: Cache, lengths: list[int] | None = None) -> Tensor:
        assert isinstance(cache, KeyValueCache)
        count = idx.size(1)
        # a net that drops out, or that FSDP has spread (and made a subclass of), goes through its modules
        if count == 1 and any(cache.lengths) and type(self) is Transformer and not (self.training and self.dropout):
            if cache.step is None:
                cache.step = OneToken(self, len(idx), cache.weights)
            return cache.step(idx[:, 0], cache)
        x = self.features(idx, cache)  # (B, T, C)
        if lengths is None or min(lengths) == count:
            cache.lengths = [before + count for before in cache.lengths]
            x = x[:, -1]
        else:  # what a row's padding has put into the cache lies beyond its length
            assert not any(cache.lengths), "rows of different lengths begin together"
            cache.lengths = list(lengths)
            x = x[torch.arange(len(x), device=x.device), torch.tensor(lengths, device=x.device) - 1]
        return self.head(x)  # (B, V)

    def new_cache(self, rows: int, weights: Weights = "full") -> KeyValueCache:
        shape = rows, len(self.blocks), self.n_kv_head, self.block_size, self.head_size
        return KeyValueCache(*shape, self.head.weight, weights)

    @property
    def slides(self) -> bool:
        return self.positions is None  # rotary positions go on for ever; learned ones end

    def rotary_at(self, positions: slice | Tensor, cache: KeyValueCache | None) -> Tensor:
        """(2, T, D / 2), or (2, B, 1, T, D / 2) where the rows' positions differ."""
        assert self.rotary is not None
        table = self.rotary
        if cache is not None and (end := max(cache.lengths) + 1) > self.block_size:
            if cache.rotary.size(1) < end:
                cache.rotary = rotary_table(2 * end, 2 * table.size(-1)).to(table)
            table = cache.rotary
        rows = table[:, positions]
        return rows if isinstance(positions, slice) else rows[:, :, None]

    def flops_per_token(self) -> int:
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 2 * len(self.blocks) * self.block_size * self.config["n_embd"]  # scores, and the sum of the values
        return 2 * (matrices + attention)


def _check_sizes(
    n_layer: int,
    n_head: int,
    n_embd: int,
    n_kv_head: int | None,
    n_hidden: int | None,
    dropout: float,
    positions: str,
) -> None:
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_kv_head": n_kv_head, "n_hidden": n_hidden}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if n_embd % n_head:
        raise UserError(f"n_embd must be a multiple of n_head, got n_embd {n_embd} and n_head {n_head}")
    if n_kv_head and n_head % n_kv_head:
        raise UserError(f"n_head must be a multiple of n_kv_head, got n_head {n_head} and n_kv_head {n_kv_head}")
    if positions == "rotary" and (n_embd // n_head) % 2:
        raise UserError(
            f"rotary positions turn pairs of channels: n_embd / n_head must be even, got {n_embd} / {n_head}"
        )
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must lie in [0, 1), got {dropout}")
