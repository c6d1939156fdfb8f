"""A hand-optimized decode step for `Transformer`: the arithmetic of its `forward`, in fewer and faster calls.

For one token, calling modules takes as long as the arithmetic: the plain cached step takes 1.5 times as long for the default
network, and 1.9 times for 6 layers of width 384 (one row, one CPU core). Compiling the plain step took 10 to 22 s, and a
token then 3 to 10 ms, because `torch.compile` copies the buffers that it cannot change in place.

Axes: B batch, C = n_embd channels, H query heads, H_kv key/value heads, D channels of a head, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight.models import Net, Transformer
from lmlight.models.attention import scaled_dot_product_attention
from lmlight.models.kv_cache import Cache
from lmlight.models.transformer import Block


class FastDecoder:
    """Decodes one token per row. It may miss later changes to the weights."""

    def __init__(self, net: Transformer, batch_size: int) -> None:
        self.net = net
        self.blocks = [_pack_block(cast("Block", block), batch_size) for block in net.blocks]
        self.head = pack_linear(net.head, batch_size)

    @staticmethod
    def supports(net: Net) -> TypeGuard[Transformer]:
        """Whether this class supports `net`. Active dropout, adapters and FSDP sharding are not supported."""
        if type(net) is not Transformer or (net.training and net.dropout):
            return False
        blocks = (cast("Block", block) for block in net.blocks)
        linears = (linear for b in blocks for linear in (b.attention.qkv, b.attention.output, b.mlp.up, b.mlp.down))
        return all(type(linear) is nn.Linear for linear in (net.head, *linears))

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Append `tokens` (B, 1) to the cache and compute the next-token logits (B, V)."""
        net, n_head, n_kv_head = self.net, self.net.config["n_head"], self.net.n_kv_head
        cache.advance(1)
        x = F.embedding(tokens[:, 0], net.embedding.weight)  # (B, C)
        if net.positions is not None:
            x = x + net.positions.weight[cache.input_pos].view(-1, x.size(1))
        if net.rope is not None:
            cos, sin = cache.rope_rows(net.rope).flatten(1, -2)[:, :, None]  # (1 or B, 1, D / 2)
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        for layer, (attention_norm, qkv, qk_norm_weight, output, mlp_norm, up, activate, down) in enumerate(
            self.blocks
        ):
            heads = qkv(attention_norm(x)).view(len(x), n_head + 2 * n_kv_head, -1)
            qk, v = heads.split_with_sizes((n_head + n_kv_head, n_kv_head), 1)  # (B, H + H_kv, D), (B, H_kv, D)
            if qk_norm_weight is not None:
                qk = torch.rms_norm(qk, qk.shape[2:], None, net.config["norm_eps"]) * qk_norm_weight
            if net.rope is not None:  # like `apply_rope`, with the minus sign in the sines
                qk = torch.addcmul(qk * cos, qk.roll(qk.size(2) // 2, -1), sin)
            q, k = qk.split_with_sizes((n_head, n_kv_head), 1)
            keys, values = cache.update(layer, k[:, :, None], v[:, :, None])
            x = x + output(scaled_dot_product_attention(q[:, :, None], keys, values, cache).flatten(1))
            x = x + down(activate(up(mlp_norm(x))))
        return self.head(net.norm(x))


def _pack_block(block: Block, batch_size: int) -> tuple[Any, ...]:
    attention, mlp, qk_norm_weight = block.attention, block.mlp, None
    if isinstance(attention.q_norm, nn.RMSNorm) and isinstance(attention.k_norm, nn.RMSNorm):
        q, k = attention.q_norm.weight, attention.k_norm.weight
        qk_norm_weight = torch.cat((q.expand(attention.n_head, -1), k.expand(attention.n_kv_head, -1)))  # (H + H_kv, D)
    linears = (attention.qkv, attention.output, mlp.up, mlp.down)
    qkv, output, up, down = (pack_linear(linear, batch_size) for linear in linears)
    # a module's `forward`, without the hooks around it
    attention_norm, mlp_norm = block.attention_norm.forward, block.mlp_norm.forward
    return attention_norm, qkv, qk_norm_weight, output, mlp_norm, up, mlp.activate, down


def pack_linear(linear: nn.Linear, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Choose the fastest implementation of a linear layer, (B, in) to (B, out), for B = `batch_size` rows.

    On a CPU, reading the weights takes most of the time. MKL's product of one row with a matrix uses a quarter of the memory
    bandwidth on some processors; two products of half the matrix with a column use all of it. For several rows, oneDNN is
    faster if it can reorder the weights in advance. On an AMD Zen 5, 6 layers of width 384 take 0.7 ms instead of 2.4 for
    one row, and 2.2 ms instead of 5.0 for 32.
    """
    weight, bias = linear.weight.detach(), linear.bias
    on_cpu = weight.device.type == "cpu"
    if on_cpu and batch_size == 1 and linear.out_features % 2 == 0:
        halves = weight.view(2, -1, linear.in_features)
        if bias is None:
            return lambda x: torch.bmm(halves, x.mT.expand(2, -1, -1)).view(1, -1)
        columns = bias.detach().view(2, -1, 1)
        return lambda x: torch.baddbmm(columns, halves, x.mT.expand(2, -1, -1)).view(1, -1)
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    onednn = onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise") and weight.dtype == torch.float32
    large = batch_size * weight.numel() > 2**19  # below, oneDNN's call takes longer than the product
    if on_cpu and onednn and batch_size > 1 and large:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        multiply = torch.ops.mkldnn._linear_pointwise.default  # what torch.compile calls
        return lambda x: multiply(x.float(), packed, bias, "none", [], "")  # autocast leaves x in bfloat16
    return lambda x: F.linear(x, weight, bias)
