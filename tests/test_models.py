"""Networks against simpler references: causality, attention, rotary positions, the loss, overfitting."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmlight import Sampling
from lmlight.errors import UserError
from lmlight.generation import generate
from lmlight.models import GPT2, LLAMA, Attention, Bigram, Transformer
from lmlight.models.attention import attention_weights, repeat_kv, scaled_dot_product_attention
from lmlight.models.kv_cache import Cache
from lmlight.models.rope import apply_rope, rope_cache

SMALL = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 4, "n_embd": 32}
VARIANTS = [
    {},
    GPT2,
    LLAMA,
    {"mlp": "relu2"},
    {"mlp": "gelu", "norm": "layernorm"},
    {"qk_norm": True, "n_kv_head": 2},
    {"n_kv_head": 1, "positions": "learned", "bias": True},
    {"tie": True, "dropout": 0.5},
]


def make(**options):
    torch.manual_seed(0)
    net = Transformer(**SMALL, **options).eval()
    for parameter in net.parameters():  # the small initial weights would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return net


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_logits_depend_on_the_past_only(options):
    net, idx = make(**options), torch.randint(11, (2, 8))
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = net(idx), net(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-4, "every later position must change"
    torch.testing.assert_close(net(idx[:, :3]), before[:, :3])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rows_of_a_batch_are_independent(options):
    net, idx = make(**options), torch.randint(11, (3, 8))
    torch.testing.assert_close(net(idx)[1:2], net(idx[1:2]))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_config_rebuilds_the_network(options):
    net = make(**options)
    again = Transformer(**net.config).eval()
    again.load_state_dict(net.state_dict())
    idx = torch.randint(11, (2, 8))
    assert torch.equal(net(idx), again(idx))


@pytest.mark.parametrize("make", [lambda: Bigram(11, 8), lambda: Transformer(**SMALL)], ids=["bigram", "transformer"])
def test_networks_can_overfit_one_batch(make):
    torch.manual_seed(1)
    net = make()
    # each token always has the same successor, which a bigram can learn, too
    successor = torch.randperm(11)
    idx = [torch.arange(4)]
    for _ in range(8):
        idx.append(successor[idx[-1]])
    idx = torch.stack(idx, dim=1)  # (4, 9)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-2)
    for _ in range(300):
        loss = F.cross_entropy(net(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_blocks_of_a_new_network_are_the_identity():
    for options in ({}, GPT2, LLAMA):
        net, idx = Transformer(**SMALL, **options), torch.randint(11, (2, 8))
        x = net.embedding(idx) + (0 if net.positions is None else net.positions.weight)
        assert torch.equal(net(idx), net.head(net.norm(x)))


def test_initial_loss_is_near_uniform():
    torch.manual_seed(0)
    net = Transformer(2048, 64)
    idx = torch.randint(2048, (8, 65))
    loss = F.cross_entropy(net(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    assert abs(loss.item() - math.log(2048)) < 0.1


needs_chunked_loss = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="the chunked loss needs torch 2.13"
)


@needs_chunked_loss
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_loss_equals_plain_loss(monkeypatch, tie, autocast):
    net = make(tie=tie)
    idx, targets = torch.randint(11, (2, 2, 8))

    def loss_and_gradients():
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net.loss(idx, targets)
        loss.backward()
        return [loss.detach().float(), *(parameter.grad.clone() for parameter in net.parameters())]

    whole = loss_and_gradients()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = F.cross_entropy(net(idx).flatten(0, 1), targets.flatten()).float()
    torch.testing.assert_close(whole[0], plain)
    monkeypatch.setattr("lmlight.models.transformer.CHUNKED_LOSS_MIN_LOGITS", 0)
    calls = []
    chunked = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *a, **k: calls.append(1) or chunked(*a, **k))
    tolerance = {"rtol": 0.05, "atol": 0.02} if autocast else {}
    for a, b in zip(whole, loss_and_gradients()):
        torch.testing.assert_close(a, b, **tolerance)
    assert calls


@needs_chunked_loss
def test_chunked_loss_is_the_mean_over_the_targets_that_are_scored(monkeypatch):
    net = make()
    idx, targets = torch.randint(11, (2, 2, 8))
    targets[0, 3:] = -100
    plain = net.loss(idx, targets)
    monkeypatch.setattr("lmlight.models.transformer.CHUNKED_LOSS_MIN_LOGITS", 0)
    torch.testing.assert_close(net.loss(idx, targets), plain)


class Capped(Transformer):
    def forward(self, idx, cache=None):
        return torch.tanh(super().forward(idx, cache))


class WithBias(Transformer):
    def __init__(self, vocab_size, block_size):
        super().__init__(vocab_size, block_size, n_layer=1, n_head=2, n_embd=16)
        self.head = torch.nn.Linear(16, vocab_size)


@needs_chunked_loss
@pytest.mark.parametrize("kind", [Capped, WithBias])
def test_large_loss_of_a_subclass_is_that_of_its_logits(kind, monkeypatch):
    net = kind(11, 8)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    idx, targets = torch.randint(11, (2, 2, 8))
    monkeypatch.setattr("lmlight.models.transformer.CHUNKED_LOSS_MIN_LOGITS", 0)
    torch.testing.assert_close(net.loss(idx, targets), F.cross_entropy(net(idx).flatten(0, 1), targets.flatten()))


@needs_chunked_loss
def test_chunked_loss_in_bfloat16_does_not_accumulate_rounding_errors(monkeypatch):
    monkeypatch.setattr("lmlight.models.transformer.CHUNKED_LOSS_MIN_LOGITS", 0)
    net = Transformer(8192, 64, n_layer=1, n_head=2, n_embd=128)
    torch.nn.init.normal_(net.head.weight)
    idx, targets = torch.randint(8192, (2, 32, 64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = net.loss(idx, targets)
    assert loss.dtype == torch.float32
    with torch.no_grad():
        exact = F.cross_entropy(net(idx).flatten(0, 1), targets.flatten())
    assert abs(loss - exact) < 1e-3 * exact


@pytest.mark.filterwarnings("error")
def test_query_key_norm_keeps_the_data_type_under_autocast():
    net = make()
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = {x.dtype for x in net.blocks[0].attention.project(torch.randn(2, 8, 32), rope=net.rope)}
    assert dtypes == {torch.bfloat16}


class NoFloat64(TorchDispatchMode):
    """Fails if a float64 tensor is made on a device other than the CPU: MPS does not support it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
                assert tensor.dtype != torch.float64, func
        return out


def test_networks_need_no_float64_on_an_accelerator():
    with torch.device("meta"), NoFloat64():
        net = Transformer(11, 8)
    assert net.rope.device.type == "meta"
    assert Transformer(11, 8).rope.device.type == "cpu"


def test_grouped_heads_work_with_any_memory_layout(monkeypatch):
    """CUDA kernels return transposed views."""
    torch.manual_seed(0)
    net = make(n_kv_head=2)
    idx = torch.randint(11, (2, 3))
    expected = generate(net, idx, Sampling(max_new_tokens=4, temperature=0))
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr("lmlight.models.attention.EXPLICIT_ATTENTION_MAX_KEYS", 0)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **options: kernel(*args, **options).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(generate(net, idx, Sampling(max_new_tokens=4, temperature=0)), expected)


def test_bigram_uses_the_last_token_only():
    net = Bigram(11, 8)
    idx = torch.randint(11, (2, 8))
    torch.testing.assert_close(net(idx), net.table.weight[idx])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"qk_norm": True, "bias": True}], ids=str)
@pytest.mark.parametrize("length", [6, 257])
def test_attention_equals_explicit_attention(causal, options, length):
    torch.manual_seed(0)
    attention = Attention(32, 4, **options).double()
    x = torch.randn(2, length, 32, dtype=torch.float64)
    q, k, v = attention.project(x)
    k, v = (repeat_kv(x, 4 // x.size(1)) for x in (k, v))
    plain = attention.output((attention_weights(q, k, causal) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, causal=causal), plain)


def test_non_causal_attention_sees_the_future():
    attention = Attention(32, 4)
    x = torch.randn(1, 6, 32)
    changed = x.clone()
    changed[:, -1] += 1
    assert (attention(x, causal=False) - attention(changed, causal=False))[:, 0].abs().max() > 1e-4
    assert torch.equal(attention(x)[:, 0], attention(changed)[:, 0])


def test_cross_attention_uses_the_context_only():
    torch.manual_seed(0)
    attention = Attention(32, 4)
    x, context = torch.randn(2, 3, 32), torch.randn(2, 7, 32)
    y = attention(x, kv_input=context, causal=False)
    assert y.shape == x.shape
    order = torch.randperm(7)
    torch.testing.assert_close(attention(x, kv_input=context[:, order], causal=False), y)  # a set has no order
    constant = context[:, :1].expand(-1, 7, -1)
    gathered = attention(x, kv_input=constant, causal=False)
    torch.testing.assert_close(gathered[:, 0], gathered[:, 1])  # all values are the same
    assert (attention(x, kv_input=context + 1, causal=False) - y).abs().max() > 1e-3


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    torch.manual_seed(0)
    grouped, full = Attention(32, 4, n_kv_head=2), Attention(32, 4)
    full.output = grouped.output
    heads = grouped.qkv.weight.view(8, 8, 32)  # 4 of queries, 2 of keys, 2 of values; channels; inputs
    full.qkv.weight.data = heads[[0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7]].reshape(96, 32)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(grouped(x), full(x))


def test_attention_weights_are_causal_and_sum_to_one():
    weights = attention_weights(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    assert weights.triu(1).abs().max() == 0


def test_rotary_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    table = rope_cache(20, 8).double()
    scores = apply_rope(q.expand(20, 8), table) @ apply_rope(k.expand(20, 8), table).T
    for distance in (0, 3, 7):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-6, rtol=0)
    # as complex numbers: channels i and i + D/2 rotate by position × frequency
    turned = torch.view_as_complex(torch.stack((q[:4], q[4:]), -1)) * torch.polar(
        torch.ones(4, dtype=torch.float64), 5 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    )
    torch.testing.assert_close(
        apply_rope(q.expand(20, 8), table)[5], torch.cat((turned.real, turned.imag)), atol=1e-6, rtol=0
    )


def test_positions_matter():
    for options in ({}, GPT2):
        net, idx = make(**options), torch.tensor([[1, 2, 3, 4]])
        swapped = torch.tensor([[2, 1, 3, 4]])
        assert (net(idx)[:, -1] - net(swapped)[:, -1]).abs().max() > 1e-4


def test_tied_weights_are_shared():
    net = make(tie=True)
    assert net.head.weight is net.embedding.weight


def test_dropout_acts_in_training_only():
    net, idx = make(dropout=0.5), torch.randint(11, (2, 8))
    assert torch.equal(net(idx), net(idx))
    net.train()
    assert not torch.equal(net(idx), net(idx))


@pytest.mark.parametrize("length", [6, 257])
def test_dropout_acts_on_attention_weights(length):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, length, 8)
    values = torch.eye(length).expand(2, 4, -1, -1)  # of which the weighted sums are the weights
    dropped = scaled_dot_product_attention(q, k, values, Cache(), dropout=0.5)
    kept, weights = dropped != 0, attention_weights(q, k, causal=True)
    torch.testing.assert_close(dropped, kept * 2 * weights)
    assert 0.4 < kept.sum() / (weights != 0).sum() < 0.6


def test_flops_match_torch_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    net = Transformer(64, 16, n_layer=3, n_head=4, n_embd=32, mlp="gelu")
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        net(torch.zeros(1, 16, dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(16 * net.flops_per_token(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_head": 3}, "n_embd 32 and n_head 3"),
        ({"n_kv_head": 3}, "n_head 4 and n_kv_head 3"),
        ({"n_head": 32}, "even"),
        ({"n_layer": 0}, "n_layer must be above 0, got 0"),
        ({"dropout": 1.0}, "got 1.0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"rope_theta": -1.0}, "rope_theta must be above 0, got -1.0"),
        ({"positions": "rope"}, "positions must be one of rotary, learned, got 'rope'"),
        ({"norm": "RMSNorm"}, "norm must be one of rmsnorm, layernorm, got 'RMSNorm'"),
        ({"mlp": "silu"}, "mlp must be one of gelu, relu2, swiglu, got 'silu'"),
        ({"bias": "QKV"}, "bias must be one of qkv, bool, got 'QKV'"),
    ],
)
def test_invalid_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        Transformer(**{**SMALL, **options})


def test_argument_that_a_checkpoint_cannot_store_by_name_is_refused():
    class Star(Bigram):
        def __init__(self, vocab_size, block_size, *widths):
            super().__init__(vocab_size, block_size)

    class Slash(Bigram):
        def __init__(self, vocab_size, block_size, width=3, /):
            super().__init__(vocab_size, block_size)

    with pytest.raises(UserError, match="must take its argument widths by name"):
        Star(3, 8, 1, 2)
    with pytest.raises(UserError, match="must take its argument vocab_size by name"):
        Slash(3, 8)
