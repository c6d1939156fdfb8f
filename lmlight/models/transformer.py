"""The decoder-only transformer, bottom up: MLP, block, network. Its attention is in `attention.py`.

- Pre-norm residual blocks.
- Options of common architectures, so that a trained network can be exported: `GPT2` and `LLAMA` are presets.
- One forward pass for training, cached decoding, attention maps and export; only the cache differs.

Axes: B batch, T positions, C = n_embd channels, H heads, D channels of a head, L layers, V vocabulary.

Papers: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); pre-norm GPT-2, Radford et al. 2019; RMSNorm, Zhang and
Sennrich 2019 (https://arxiv.org/abs/1910.07467); SwiGLU, Shazeer 2020 (https://arxiv.org/abs/2002.05202); ReLU², So et al.
2021 (https://arxiv.org/abs/2109.08668).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmlight.errors import UserError, check_literals
from lmlight.models.attention import Attention, RMSNorm, apply_dropout
from lmlight.models.base import Net
from lmlight.models.kv_cache import Cache, KeyValueCache
from lmlight.models.rope import rope_cache

# At or above this many logits (512 MiB in float32), compute the loss in chunks, if torch has `linear_cross_entropy`.
CHUNKED_LOSS_MIN_LOGITS = 2**27

GPT2: dict[str, Any] = dict(norm="layernorm", positions="learned", mlp="gelu", qk_norm=False, bias=True, tie=True)
"""`Transformer` arguments for GPT-2's architecture, without sizes."""
LLAMA: dict[str, Any] = dict(norm="rmsnorm", positions="rotary", mlp="swiglu", qk_norm=False, bias=False, tie=False)
"""`Transformer` arguments for Llama's architecture, without sizes; with `qk_norm`, Qwen3's."""

NormName = Literal["rmsnorm", "layernorm"]
Activation = Literal["gelu", "relu2", "swiglu"]


def make_norm(name: NormName, size: int, eps: float, bias: bool) -> nn.Module:
    return RMSNorm(size, eps=eps) if name == "rmsnorm" else nn.LayerNorm(size, eps=eps, bias=bias)


def default_intermediate_size(kind: str, n_embd: int) -> int:
    """Return 4 C; for SwiGLU, which has a third matrix, 8/3 C, rounded to a multiple of 8."""
    return 8 * round(n_embd / 3) if kind == "swiglu" else 4 * n_embd


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, n_embd: int, intermediate_size: int, kind: Activation, dropout: float, bias: bool) -> None:
        super().__init__()
        self.kind, self.dropout = kind, dropout
        self.up = nn.Linear(n_embd, intermediate_size * (2 if kind == "swiglu" else 1), bias=bias)
        self.down = nn.Linear(intermediate_size, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return apply_dropout(self.down(self.activate(self.up(x))), self.dropout, self.training)

    def activate(self, h: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            return F.silu(gate) * value
        return F.relu(h).square() if self.kind == "relu2" else F.gelu(h, approximate="tanh")  # as in GPT-2


class Block(nn.Module):
    """Attention, then an MLP, each applied to the normalized input and added to the residual stream."""

    def __init__(self, attention: Attention, mlp: MLP, attention_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, rope: Tensor | None, cache: Cache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope=rope, cache=cache, layer=layer)
        return x + self.mlp(self.mlp_norm(x))  # (B, T, C)


class Transformer(Net):
    """A decoder-only transformer.

    Args:
        vocab_size: V.
        block_size: the longest context, in tokens.
        n_layer: number of blocks.
        n_head: attention heads per block; must divide `n_embd` unless `head_size` is given.
        n_embd: width of the residual stream.
        n_kv_head: key/value heads (grouped-query attention); must divide `n_head`. Null means `n_head`.
        head_size: channels of a head. Null means `n_embd` / `n_head`.
        dropout: dropout probability of embeddings, attention weights and the output of each sublayer.
        norm: RMSNorm or LayerNorm.
        positions: rotary position embeddings, or learned ones that are added to the token embeddings.
        mlp: activation of the MLP: GELU, ReLU² or SwiGLU.
        qk_norm: apply RMSNorm to queries and keys.
        bias: use a bias in linear layers and LayerNorm; `qkv`: for queries, keys and values only (Qwen2).
        tie: use the token embedding as the output layer.
        intermediate_size: MLP hidden size. Null means 4 `n_embd`, or 8/3 `n_embd` for SwiGLU.
        norm_eps: epsilon of all norms.
        rope_theta: base of the rotary frequencies.

    Attributes:
        recomputes_blocks: whether training keeps only the input of each block and recomputes the rest in the backward pass
            (gradient checkpointing): less memory, a third more time.

    Raises:
        UserError: a value is out of range or not a valid choice, or sizes do not match.
    """

    recomputes_blocks = False

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        n_kv_head: int | None = None,
        head_size: int | None = None,
        dropout: float = 0.0,
        norm: NormName = "rmsnorm",
        positions: Literal["rotary", "learned"] = "rotary",
        mlp: Activation = "relu2",
        qk_norm: bool = True,
        bias: bool | Literal["qkv"] = False,
        tie: bool = False,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        check_literals(Transformer.__init__, locals())
        positive: dict[str, float | None] = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        positive |= {"n_kv_head": n_kv_head, "head_size": head_size, "intermediate_size": intermediate_size}
        _check(positive | {"norm_eps": norm_eps, "rope_theta": rope_theta}, dropout)
        self.head_size = head_size or n_embd // n_head
        if positions == "rotary" and self.head_size % 2:
            raise UserError(
                f"rotary positions need an even head size (head_size, or n_embd / n_head), got {self.head_size}"
            )
        self.rope_theta = rope_theta
        self.n_head, self.n_kv_head, self.dropout = n_head, n_kv_head or n_head, dropout
        self.intermediate_size = intermediate_size or default_intermediate_size(mlp, n_embd)
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd) if positions == "learned" else None
        rope = rope_cache(block_size, self.head_size, rope_theta) if positions == "rotary" else None
        self.rope: Tensor | None
        self.register_buffer("rope", rope, persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                Attention(n_embd, n_head, n_kv_head, dropout, bias, qk_norm, norm_eps, head_size),
                MLP(n_embd, self.intermediate_size, mlp, dropout, bias is True),
                make_norm(norm, n_embd, norm_eps, bias is True),
                make_norm(norm, n_embd, norm_eps, bias is True),
            )
            for _ in range(n_layer)
        )
        self.norm = make_norm(norm, n_embd, norm_eps, bias is True)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # as in GPT-2, but blocks start as the identity
                ends_branch = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.0 if ends_branch else 0.02)

    def forward(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Map token ids (B, T) to the logits (B, T, V) of each next token.

        Args:
            idx: T is at most `block_size`.
            cache: holds earlier tokens, which `idx` continues; None keeps nothing.
        """
        x = self.hidden_states(idx, cache)
        return self.head(x[:, -1:] if cache is not None and cache.last_only else x)

    def hidden_states(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute the input (B, T, C) of the output layer; see `forward`."""
        assert idx.size(1) <= self.block_size, f"{idx.size(1)} positions, block_size {self.block_size}"
        cache = Cache() if cache is None else cache
        cache.advance(idx.size(1))
        x = self.embedding(idx)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[cache.input_pos]
        x = apply_dropout(x, self.dropout, self.training)
        rope = None
        if self.rope is not None:
            rope = cache.rope_rows(self.rope)  # (2, T, D / 2)
            if rope.dim() == 4:  # (2, B, T, D / 2), if rows differ: broadcast over heads
                rope = rope[:, :, None]
        for layer, block in enumerate(self.blocks):
            if self.recomputes_blocks and self.training:
                x = checkpoint(block, x, rope, cache, layer, use_reentrant=False)
            else:
                x = block(x, rope, cache, layer)
        return self.norm(x)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        is_own = type(self).forward is Transformer.forward and type(self.head) is nn.Linear and self.head.bias is None
        can_chunk = is_own and hasattr(F, "linear_cross_entropy")  # a subclass or an adapter may change the logits
        if not can_chunk or idx.numel() * self.vocab_size < CHUNKED_LOSS_MIN_LOGITS:
            return super().loss(idx, targets)
        x, weight = self.hidden_states(idx).flatten(0, 1), self.head.weight
        if torch.is_autocast_enabled(x.device.type):  # does not cover this function
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        # `reduction="mean"` sums the chunks in the type of x, which in bfloat16 is off by up to 0.5 nats
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, 2**25 // self.vocab_size))  # 128 MiB of logits
        targets = targets.flatten()
        losses = F.linear_cross_entropy(x, weight, targets, reduction="none", options=options).float()
        return losses.sum() / (targets != -100).sum()  # of the targets that `F.cross_entropy` does not ignore

    def attention_maps(self, idx: Tensor) -> Tensor:
        """Compute the attention weights of all layers: (B, T) ids to (L, B, H, T, T); rows sum to 1."""
        maps: list[Tensor] = []
        self.hidden_states(idx, Cache(attention_maps=maps))
        return torch.stack(maps)

    def make_cache(self, batch_size: int) -> KeyValueCache:
        shape = batch_size, len(self.blocks), self.n_kv_head, self.block_size, self.head_size
        return KeyValueCache(shape, self.head.weight, self.rope_theta if self.positions is None else None)

    def flops_per_token(self) -> int:
        # the scores and the weighted sum of the values
        return super().flops_per_token() + 4 * len(self.blocks) * self.block_size * self.n_head * self.head_size


def _check(positive: dict[str, float | None], dropout: float) -> None:
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, got {value}")
    n_head, n_embd, n_kv_head = positive["n_head"], positive["n_embd"], positive["n_kv_head"]
    assert n_head and n_embd
    if n_embd % n_head and not positive["head_size"]:
        raise UserError(f"n_embd must be a multiple of n_head, got n_embd {n_embd} and n_head {n_head}")
    if n_kv_head and n_head % n_kv_head:
        raise UserError(f"n_head must be a multiple of n_kv_head, got n_head {n_head} and n_kv_head {n_kv_head}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be in [0, 1), got {dropout}")
