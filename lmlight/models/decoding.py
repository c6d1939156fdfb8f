"""One more token for each row of a transformer: what its `forward` computes, in as few calls as possible.

A token's arithmetic is so little that calling for it takes as long: 6 layers of width 384 went through the modules in
1.6 ms, of which their matrix products took 0.8. Here nothing is looked up, checked or reshaped that need not be, and each
matrix is multiplied in the way that is fastest for so many rows. (`torch.compile` of the same step took 10 to 22 s, and 3 to
10 ms a token on two CPU cores: it copies what it cannot change in place.)

Axes: B rows, C = n_embd channels, H heads of queries, H_kv of keys and values, D channels of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.errors import UserError
from lmlight.models.attention import NORM_EPS, attend
from lmlight.models.base import Weights
from lmlight.models.kv_cache import KeyValueCache

if TYPE_CHECKING:
    from lmlight.models.transformer import Block, Transformer

Product = Callable[[Tensor], Tensor]
"""Maps (B, in) to (B, out)."""


class Layer(NamedTuple):
    """What a block does, in the order in which it does it.

    Attributes:
        gains: (H + H_kv, D) of the query/key norm, if there is one.
    """

    attention_norm: Product
    qkv: Product
    gains: Tensor | None
    output: Product
    mlp_norm: Product
    up: Product
    activate: Product
    down: Product


class OneToken:
    """The step of a net, for batches of one size.

    Args:
        net: its weights are taken as they are now.
        rows: B.
        weights: see `product`.
    """

    def __init__(self, net: Transformer, rows: int, weights: Weights) -> None:
        self.net = net
        self.layers = [self._layer(cast("Block", block), rows, weights) for block in net.blocks]
        self.head = product(net.head, rows, weights)

    @staticmethod
    def _layer(block: Block, rows: int, weights: Weights) -> Layer:
        attention, mlp, gains = block.attention, block.mlp, None
        if isinstance(attention.q_norm, nn.RMSNorm) and isinstance(attention.k_norm, nn.RMSNorm):
            q, k = attention.q_norm.weight, attention.k_norm.weight
            gains = torch.cat((q.expand(attention.n_head, -1), k.expand(attention.n_kv_head, -1)))
        linears = (attention.qkv, attention.output, mlp.up, mlp.down)
        qkv, output, up, down = (product(linear, rows, weights) for linear in linears)
        # a module's `forward` without what is around it
        norms = block.attention_norm.forward, block.mlp_norm.forward
        return Layer(norms[0], qkv, gains, output, norms[1], up, mlp.activate, down)

    def __call__(self, idx: Tensor, cache: KeyValueCache) -> Tensor:
        """(B, V) logits of what follows `idx` (B,), which the cache sees."""
        net = self.net
        n_query, n_key = net.config["n_head"], net.n_kv_head
        cache.place(1)
        x = F.embedding(idx, net.embedding.weight)  # (B, C)
        if net.positions is not None:
            x = x + net.positions.weight[cache.positions].view(-1, x.size(1))
        turn = None
        if net.rotary is not None:
            cos, sin = net.rotary_at(cache.positions, cache).flatten(1, -2)[:, :, None]  # (1 or B, 1, D / 2)
            turn = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        for number, layer in enumerate(self.layers):
            attention_norm, qkv, gains, output, mlp_norm, up, activate, down = layer
            heads = qkv(attention_norm(x)).view(len(x), n_query + 2 * n_key, -1)
            qk, v = heads.split_with_sizes((n_query + n_key, n_key), 1)  # (B, H + H_kv, D), (B, H_kv, D)
            if gains is not None:
                qk = torch.rms_norm(qk, qk.shape[2:], None, NORM_EPS) * gains
            if turn is not None:  # as `rotate` does: the other half of the channels comes with a minus in the first
                qk = torch.addcmul(qk * turn[0], qk.roll(qk.size(2) // 2, -1), turn[1])
            q, k = qk.split_with_sizes((n_query, n_key), 1)
            keys, values = cache.put(number, k[:, :, None], v[:, :, None])
            y = attend(q[:, :, None], keys, values, False, cache.visible)  # (B, H, 1, D)
            x = x + output(y.flatten(1))
            x = x + down(activate(up(mlp_norm(x))))
        cache.lengths = [length + 1 for length in cache.lengths]
        return self.head(net.norm(x))


def product(linear: nn.Linear, rows: int, weights: Weights = "full") -> Product:
    """The fastest way to a linear map of so many rows.

    On a CPU the time goes into reading the weights. MKL's product of one row with a matrix reads at a quarter of the
    memory's speed on some processors; two products of half the matrix with a column read at all of it. For several rows
    oneDNN is the faster one, if it may lay out the weights beforehand (6 layers of width 384 on an AMD Zen 5: one row in
    0.7 ms in place of 2.4, 32 in 2.2 in place of 5.0).

    Args:
        linear: its weights are taken as they are now.
        rows: B.
        weights: `int8` rounds those of each output to 255 steps of the largest, and the inputs to bfloat16.

    Raises:
        UserError: `int8` on another device than a CPU.
    """
    weight, bias = linear.weight.detach(), linear.bias
    on_cpu = weight.device.type == "cpu"
    if weights == "int8":
        if not on_cpu:
            raise UserError(f"weights int8 are for CPUs, and this net is on {weight.device.type}: pass full")
        step = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        rounded, steps = (weight.float() / step).round().to(torch.int8), step[:, 0].bfloat16()
        zeros = torch.zeros(()) if bias is None else bias.detach()
        return lambda x: torch._weight_int8pack_mm(x.bfloat16(), rounded, steps).to(x.dtype) + zeros
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    onednn = onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise") and weight.dtype == torch.float32
    small = rows * weight.numel() <= 2**19  # oneDNN's call would take longer than the product
    if on_cpu and onednn and rows > 1 and not small:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        multiply = torch.ops.mkldnn._linear_pointwise.default  # what torch.compile calls
        return lambda x: multiply(x, packed, bias, "none", [], "")
    if on_cpu and rows == 1 and linear.out_features % 2 == 0:
        halves = weight.view(2, -1, linear.in_features)
        if bias is None:
            return lambda x: torch.bmm(halves, x.mT.expand(2, -1, -1)).view(1, -1)
        columns = bias.detach().view(2, -1, 1)
        return lambda x: torch.baddbmm(columns, halves, x.mT.expand(2, -1, -1)).view(1, -1)
    return lambda x: F.linear(x, weight, bias)
