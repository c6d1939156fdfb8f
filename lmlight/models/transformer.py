"""The decoder-only transformer, from small to whole: norm, rotary positions, attention, MLP, block, net.

- Pre-norm residual blocks; attention through `scaled_dot_product_attention`.
- The options are those of stock architectures, so that a trained net can be exported: `GPT2` and `LLAMA` are presets.
- Attention is its own module and does more than the decoder asks of it: without the causal mask it is an encoder's,
  with a `context` it is cross-attention.

Axes: B rows, T positions, S positions attended to, C = n_embd channels, H = n_head heads, D = C / H, V vocabulary.

Papers: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); pre-norm GPT-2, Radford et al. 2019; RMSNorm, Zhang and
Sennrich 2019 (https://arxiv.org/abs/1910.07467); rotary positions, Su et al. 2021 (https://arxiv.org/abs/2104.09864);
SwiGLU, Shazeer 2020 (https://arxiv.org/abs/2002.05202); ReLU², So et al. 2021 (https://arxiv.org/abs/2109.08668);
grouped queries, Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245); query/key norm, Henry et al. 2020
(https://arxiv.org/abs/2010.04245).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.errors import UserError
from lmlight.models.base import Cache, Net, init_arguments

NORM_EPS = 1e-5
ROPE_BASE = 10000.0
# From so many logits on (half a gigabyte in float32) the loss is computed in chunks that are not kept, from torch 2.13 on.
MANY_LOGITS = 2**27

GPT2: dict[str, Any] = dict(norm="layernorm", positions="learned", mlp="gelu", qk_norm=False, bias=True, tie=True)
"""`Transformer` arguments that give GPT-2's architecture; sizes are added to them."""
LLAMA: dict[str, Any] = dict(norm="rmsnorm", positions="rotary", mlp="swiglu", qk_norm=False, bias=False, tie=False)
"""`Transformer` arguments that give Llama's architecture; with `qk_norm`, Qwen3's."""

NormName = Literal["rmsnorm", "layernorm"]


def make_norm(name: NormName, size: int, bias: bool) -> nn.Module:
    return nn.RMSNorm(size, eps=NORM_EPS) if name == "rmsnorm" else nn.LayerNorm(size, eps=NORM_EPS, bias=bias)


def drop(x: Tensor, dropout: float, training: bool) -> Tensor:
    """`F.dropout`, which costs as much as a small product where there is nothing to drop."""
    return F.dropout(x, dropout) if training and dropout else x


class Linear(nn.Linear):
    """`nn.Linear`, and on a CPU another way to the same for the few rows of a decoding step.

    There the time goes into reading the weights once, and MKL's product of one row with a matrix reads at a quarter of the
    memory's speed on some processors; two products of half the matrix with a column read at all of it (6 layers of width 384
    on an AMD Zen 5: 1.4 ms a token in place of 4.7; of 32 tokens at once, 6.7 in place of 10.9).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        decoding = rows <= 32 and x.device.type == "cpu" and not torch.is_grad_enabled()
        if not decoding or self.out_features % 2 or x.dtype != self.weight.dtype:
            return super().forward(x)
        halves = self.weight.view(2, -1, self.in_features)
        columns = x.reshape(rows, -1).mT.expand(2, -1, -1)
        bias = self.bias
        y = torch.bmm(halves, columns) if bias is None else torch.baddbmm(bias.view(2, -1, 1), halves, columns)
        return y.view(self.out_features, rows).mT.reshape(*x.shape[:-1], self.out_features)


def rotary_table(positions: int, head_size: int) -> Tensor:
    """Cosines and sines of the angles by which rotary positions turn each pair of channels.

    Returns:
        (2, positions, D / 2): cosines, then sines.
    """
    frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)  # (D / 2,)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns channel i and channel i + D/2 by the angle of the position: (..., T, D) with a (2, T, D / 2) table."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_weights(q: Tensor, k: Tensor, causal: bool, visible: Tensor | None = None) -> Tensor:
    """How much each position attends to each other one: the four lines that the fused kernel computes.

    Args:
        q: (B, H, T, D) queries.
        k: (B, H, S, D) keys.
        causal: hide position s from position t < s.
        visible: boolean, broadcast to (B, H, T, S): hide what is false.

    Returns:
        (B, H, T, S); each row adds up to 1.
    """
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(dim=-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, visible: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """What each position gathers: (B, H, T, D) queries, (B, H_kv, S, D) keys and values to (B, H, T, D).

    On a CPU short sequences take the four lines themselves: the fused kernel cuts them into products too small to be fast
    (block 64, 4 heads of 32: a training step in 0.78 of the time), while long ones would need H T² numbers.
    """
    group = q.size(1) // k.size(1)
    if group > 1 and q.size(2) == 1:  # the heads of a group ask the same keys: as well as positions might
        return attend(q.reshape(q.size(0), k.size(1), group, -1), k, v, False, visible, dropout).view(q.shape)
    k, v = repeat_heads(k, group), repeat_heads(v, group)
    one_query = q.size(0) == 1 == q.size(2)  # of which the kernel makes the most
    if q.device.type == "cpu" and k.size(-2) <= 256 and not one_query:
        return drop(attention_weights(q, k, causal, visible), dropout, True) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=causal)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """(B, H_kv, S, D) to (B, times H_kv, S, D): each head `times` times in a row, for the queries of its group."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


class KeyValueCache(Cache):
    """The keys and values of the last S tokens, block by block, in buffers that are made once.

    A row's token t lies in slot t mod S, so that the oldest is overwritten once S are there.

    Args:
        rows: B.
        n_layer: blocks.
        heads: H_kv.
        slots: S.
        head_size: D.
        like: gives the data type and the device.
    """

    def __init__(self, rows: int, n_layer: int, heads: int, slots: int, head_size: int, like: Tensor) -> None:
        super().__init__(rows)
        shape = (n_layer, 2, rows, heads, slots, head_size)
        self.buffers = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.layers = [(self.buffers[layer, 0], self.buffers[layer, 1]) for layer in range(n_layer)]
        self.slots = slots
        self.rotary = torch.empty(2, 0, head_size // 2)  # of positions beyond the net's own table, once there are any

    def place(self, count: int) -> None:
        """Decides where the next `count` tokens go and what they may see; the same in each block.

        Sets `positions`, of each token in its row, as a slice where all rows agree, else (B, 1); and `causal` and
        `visible`, which `attend` takes.
        """
        first, last = min(self.lengths), max(self.lengths)
        self.read = min(last + count, self.slots)
        self.causal, self.visible = False, None
        self.positions: slice | Tensor
        if first == last:
            self.positions = slice(first, first + count)
            slot = first % self.slots
            assert slot + count <= self.slots, f"{count} tokens at once do not fit behind {first} in {self.slots} slots"
            self.write: slice | Tensor = slice(slot, slot + count)
            if count > 1:
                assert first < self.slots, "beyond the block, a token at a time"
                self.causal = first == 0
                if first:
                    ones = torch.ones(count, self.read, dtype=torch.bool, device=self.buffers.device)
                    self.visible = ones.tril(first)
        else:
            assert count == 1, "rows of different lengths are extended a token at a time"
            lengths = torch.tensor(self.lengths, device=self.buffers.device)
            self.positions, self.write = lengths[:, None], lengths % self.slots
            self.visible = (torch.arange(self.read, device=lengths.device) <= self.positions)[:, None, None]

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values (B, H_kv, T, D) of one block; all that the tokens may see, (B, H_kv, S, D)."""
        keys, values = self.layers[layer]
        if isinstance(self.write, slice):
            keys.narrow(2, self.write.start, k.size(2)).copy_(k)
            values.narrow(2, self.write.start, k.size(2)).copy_(v)
        else:
            rows = torch.arange(len(k), device=k.device)
            keys[rows, :, self.write], values[rows, :, self.write] = (
                k[:, :, 0].to(keys.dtype),
                v[:, :, 0].to(keys.dtype),
            )
        return keys.narrow(2, 0, self.read), values.narrow(2, 0, self.read)

    def replace(self, rows: list[int], other: Cache) -> None:
        super().replace(rows, other)
        assert isinstance(other, KeyValueCache)
        self.buffers[:, :, rows] = other.buffers


class Attention(nn.Module):
    """Multi-head attention: each position asks (query), each offers itself (key) and gives (value).

    Args:
        n_embd: C.
        n_head: H.
        n_kv_head: heads of keys and values, each shared by `n_head / n_kv_head` query heads.
        dropout: of attention weights and of the output, while training.
        bias: in the linear maps.
        qk_norm: RMSNorm of queries and keys, head by head.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = n_head, n_kv_head or n_head, n_embd // n_head
        self.dropout = dropout
        # queries, keys and values in one matrix: one large product is faster than three
        self.qkv = Linear(n_embd, (n_head + 2 * self.n_kv_head) * self.head_size, bias=bias)
        self.output = Linear(n_embd, n_embd, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_size, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_size, eps=NORM_EPS) if qk_norm else nn.Identity()

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, H, T, D), keys and values (B, H_kv, T, D) of each position."""
        x = self.qkv(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return torch.split(x, [self.n_head, self.n_kv_head, self.n_kv_head], dim=1)

    def project(
        self, x: Tensor, context: Tensor | None = None, rotary: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, H_kv, S, D) as they enter the attention."""
        q, k, v = self._heads(x)
        if context is not None:
            _, k, v = self._heads(context)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rotary: Tensor | None = None,
        causal: bool = True,
        cache: tuple[KeyValueCache, int] | None = None,
    ) -> Tensor:
        """What each position of `x` gathers.

        Args:
            x: (B, T, C).
            context: (B, S, C) attended to instead of `x` itself (cross-attention).
            rotary: `rotary_table` of the T positions, for self-attention.
            causal: no position sees a later one.
            cache: with the block's number, where earlier positions are kept; it knows what is causal.

        Returns:
            (B, T, C).
        """
        q, k, v = self.project(x, context, rotary)
        visible = None
        if cache is not None:
            memory, layer = cache
            k, v = memory.put(layer, k, v)
            causal, visible = memory.causal, memory.visible
        y = attend(q, k, v, causal, visible, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = self.output(y.transpose(1, 2).flatten(2))
        return drop(y, self.dropout, self.training)


class MLP(nn.Module):
    """What each position does with what it has gathered; the hidden layer is 4 C wide, or 8/3 C with a gate."""

    def __init__(self, n_embd: int, kind: Literal["gelu", "relu2", "swiglu"], dropout: float, bias: bool) -> None:
        super().__init__()
        self.kind, self.dropout = kind, dropout
        # the gate is a third matrix: 8/3 in place of 4 keeps the number of weights, in eights for the hardware's sake
        self.hidden = 8 * round(n_embd / 3) if kind == "swiglu" else 4 * n_embd
        self.up = Linear(n_embd, 2 * self.hidden if kind == "swiglu" else self.hidden, bias=bias)
        self.down = Linear(self.hidden, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, hidden), or gate and value side by side
        if self.kind == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        elif self.kind == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh")  # GPT-2's
        return drop(self.down(h), self.dropout, self.training)


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
    ) -> None:
        super().__init__(init_arguments(locals()))
        _check_sizes(
            **{k: self.config[k] for k in ("n_layer", "n_head", "n_embd", "n_kv_head", "dropout", "positions")}
        )
        self.dropout = dropout
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd) if positions == "learned" else None
        rotary = rotary_table(block_size, n_embd // n_head) if positions == "rotary" else None
        self.register_buffer("rotary", rotary, persistent=False)
        self.rotary: Tensor | None
        self.blocks = nn.ModuleList(
            Block(
                Attention(n_embd, n_head, n_kv_head, dropout, bias, qk_norm),
                MLP(n_embd, mlp, dropout, bias),
                make_norm(norm, n_embd, bias),
                make_norm(norm, n_embd, bias),
            )
            for _ in range(n_layer)
        )
        self.norm = make_norm(norm, n_embd, bias)
        self.head = Linear(n_embd, vocab_size, bias=False)
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
        if idx.numel() * self.vocab_size < MANY_LOGITS or not hasattr(F, "linear_cross_entropy"):
            return super().loss(idx, targets)
        x, weight = self.features(idx).flatten(0, 1), self.head.weight
        if torch.is_autocast_enabled(x.device.type):  # which does not know this function
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return F.linear_cross_entropy(x, weight, targets.flatten(), options=nn.LinearCrossEntropyOptions())

    def features(self, idx: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T) ids to the (B, T, C) of which `head` makes the logits."""
        T = idx.size(1)
        assert self.block_size >= T, f"{T} positions, block_size {self.block_size}"
        if cache is not None:
            cache.place(T)
        positions = slice(0, T) if cache is None else cache.positions
        x = self.embedding(idx)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[positions]
        x = drop(x, self.dropout, self.training)
        rotary = None if self.rotary is None else self._rotary_at(positions, cache)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, None if cache is None else (cache, layer))
        return self.norm(x)

    @torch.no_grad()
    def extend(self, idx: Tensor, cache: Cache, lengths: list[int] | None = None) -> Tensor:
        assert isinstance(cache, KeyValueCache)
        x = self.features(idx, cache)  # (B, T, C)
        count = idx.size(1)
        if lengths is None or min(lengths) == count:
            cache.lengths = [before + count for before in cache.lengths]
            x = x[:, -1]
        else:  # what a row's padding has put into the cache lies beyond its length
            assert not any(cache.lengths), "rows of different lengths begin together"
            cache.lengths = list(lengths)
            x = x[torch.arange(len(x), device=x.device), torch.tensor(lengths, device=x.device) - 1]
        return self.head(x)  # (B, V)

    def new_cache(self, rows: int) -> KeyValueCache:
        heads: int = self.config["n_kv_head"] or self.config["n_head"]
        head_size = self.config["n_embd"] // self.config["n_head"]
        return KeyValueCache(rows, len(self.blocks), heads, self.block_size, head_size, like=self.head.weight)

    @property
    def slides(self) -> bool:
        return self.positions is None  # rotary positions go on for ever; learned ones end

    def _rotary_at(self, positions: slice | Tensor, cache: KeyValueCache | None) -> Tensor:
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


def _check_sizes(n_layer: int, n_head: int, n_embd: int, n_kv_head: int | None, dropout: float, positions: str) -> None:
    for name, value in (("n_layer", n_layer), ("n_head", n_head), ("n_embd", n_embd), ("n_kv_head", n_kv_head)):
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
