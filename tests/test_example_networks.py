"""The networks in examples/networks keep the contract of `Net`, and compute what their papers say."""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
import torch.nn.functional as F
from decoding import assert_batched_equals_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lmlight import LanguageModel, Sampling
from lmlight.errors import UserError
from lmlight.generation import Decoder, generate_ids
from lmlight.models.check import check_net
from lmlight.models.transformer import MLP
from lmlight.optim import Muon, parameter_groups
from lmlight.training.cli import main

NETWORKS = Path(__file__).parents[1] / "examples" / "networks"
sys.path.append(str(NETWORKS))

from gated_recurrence import GatedRecurrence, scan  # noqa: E402
from mixture_of_experts import Experts, MixtureOfExperts  # noqa: E402

NETS = [
    (GatedRecurrence, {}),
    (GatedRecurrence, {"conv_width": 2}),
    (MixtureOfExperts, {"n_head": 2}),
    (MixtureOfExperts, {"n_head": 2, "num_experts": 3, "top_k": 1, "mlp": "swiglu", "bias": True}),
]
each_net = pytest.mark.parametrize(("kind", "options"), NETS, ids=str)


def make(kind, options, vocab_size=11, block_size=8):
    torch.manual_seed(0)
    net = kind(vocab_size, block_size, n_layer=2, n_embd=16, **options).eval()
    for parameter in net.parameters():  # away from the initial zeros, which hide errors
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return net.double()


def loop(a, b, h):
    """The recurrence as it is defined."""
    states = []
    for t in range(a.size(1)):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


@each_net
def test_logits_depend_on_all_earlier_tokens_and_no_later_one(kind, options):
    check_net(partial(kind, n_layer=2, n_embd=16, **options), 8)
    net, idx = make(kind, options), torch.randint(11, (2, 8))
    changed = idx.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 11
    before, after = net(idx), net(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-12)
    assert (before[:, 3:] - after[:, 3:]).abs().amax((0, 2)).min() > 1e-4
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    assert (before - net(changed)).abs().amax((0, 2)).min() > 1e-6


@each_net
def test_rows_are_independent_and_the_config_makes_the_same_network(kind, options):
    net, idx = make(kind, options), torch.randint(11, (3, 8))
    torch.testing.assert_close(net(idx)[1:2], net(idx[1:2]))
    again = kind(**net.config).eval().double()
    again.load_state_dict(net.state_dict())
    assert torch.equal(net(idx), again(idx))


@each_net
def test_training_starts_at_the_loss_of_a_uniform_guess(kind, options):
    torch.manual_seed(0)
    net, (idx, targets) = kind(512, 16, **options), torch.randint(512, (2, 4, 16))
    assert abs(F.cross_entropy(net(idx).flatten(0, 1), targets.flatten()).item() - math.log(512)) < 0.1


@each_net
@pytest.mark.parametrize("optimizer", [Muon, torch.optim.AdamW])
def test_each_weight_gets_a_gradient_and_an_update(kind, options, optimizer):
    net, (idx, targets) = make(kind, options), torch.randint(11, (2, 4, 8))
    groups = parameter_groups(net)
    assert [group["name"] for group in groups] == ["hidden", "embeddings", "vectors"]
    assert [parameter.dim() for parameter in groups[0]["params"]] == [2] * len(groups[0]["params"])
    assert len(groups[1]["params"]) == 2
    before = copy.deepcopy(net)
    steps = optimizer(groups, lr=1e-3)
    net.loss(idx, targets).backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0 for parameter in net.parameters())
    steps.step()
    assert all(not torch.equal(old, new) for old, new in zip(before.parameters(), net.parameters()))


@each_net
def test_logits_are_finite_in_bfloat16(kind, options):
    net, idx = make(kind, options).float(), torch.randint(11, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.loss(idx, idx)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    steps = list(generate_ids(net.bfloat16(), [[1], [2, 3]], Sampling(max_new_tokens=12), [0, 1]))
    assert all(step.logits.isfinite().all() for step in steps)


@settings(max_examples=30)
@given(net=st.sampled_from(NETS), seed=st.integers(0, 99), data=st.data())
@torch.no_grad()
def test_cached_logits_equal_uncached(net, seed, data):
    """For tokens appended in pieces of any size."""
    net, idx = make(*net), torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(seed))
    cache, pieces = net.make_cache(3), []
    while (seen := cache.length) < 8:
        pieces.append(net(idx[:, seen : seen + data.draw(st.integers(1, 8 - seen))], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), net(idx), rtol=0, atol=1e-10)


@settings(max_examples=30)
@given(net=st.sampled_from(NETS), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@torch.no_grad()
def test_batched_logits_equal_those_of_each_row_alone(net, lengths):
    assert_batched_equals_alone(make(*net), lengths)


@pytest.mark.parametrize("options", [{}, {"conv_width": 2}, {"conv_width": 6}], ids=str)
@torch.no_grad()
def test_a_recurrence_remembers_beyond_the_block(options):
    net = make(GatedRecurrence, options)
    rows = [torch.randint(11, (40,)), torch.randint(11, (37,))]
    decoder = Decoder(net, 2)
    logits = [decoder.prefill([rows[0][:8].tolist(), rows[1][:5].tolist()])]
    for t in range(32):
        logits.append(decoder.step(torch.stack([rows[0][8 + t : 9 + t], rows[1][5 + t : 6 + t]])))
    for row, (ids, length) in enumerate(zip(rows, (8, 5))):
        whole = net(ids[None])[0, length - 1 :]
        torch.testing.assert_close(torch.stack([step[row] for step in logits]), whole, rtol=0, atol=1e-10)
    assert sum(tensor.numel() for tensor in decoder.cache.h) == 2 * 2 * 16  # layers, rows, channels: as at the start
    assert decoder.cache.recent[0].shape == (2, net.config["conv_width"] - 1, 16)


@torch.no_grad()
def test_a_recurrence_ignores_padding_exactly():
    net, prompt = make(GatedRecurrence, {}), torch.randint(11, (1, 3))
    padded = torch.cat((torch.randint(11, (2, 5)), prompt.expand(2, 3)), 1)
    cache = net.make_cache(2)
    cache.set_padding([5, 5])
    logits = net(padded, cache=cache)
    assert not torch.equal(padded[0, :5], padded[1, :5])
    assert torch.equal(logits[0, 5:], logits[1, 5:])
    assert all(torch.equal(h[0], h[1]) for h in (*cache.h, *cache.recent))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 64, 100])
def test_the_scan_is_the_loop_with_the_same_gradients(length):
    torch.manual_seed(0)
    a, b = torch.rand(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    a[:, ::7], a[:, 3::7] = 0, 1  # forget everything, forget nothing
    inputs = [x.requires_grad_() for x in (a, b, torch.randn(2, 3, dtype=torch.float64))]
    weights = torch.randn(2, length, 3, dtype=torch.float64)
    for x, y in zip(inputs, torch.autograd.grad((weights * loop(*inputs)).sum(), inputs)):
        (gradient,) = torch.autograd.grad((weights * scan(*inputs)).sum(), x)
        torch.testing.assert_close(gradient, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(scan(*inputs), loop(*inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 1e-30, 0.1, 0.999, 1.0])
def test_the_scan_is_precise_in_float32_over_long_blocks(decay):
    """A sum of inputs that are divided by their decays would overflow."""
    torch.manual_seed(0)
    a, b = torch.full((1, 1024, 2), decay), torch.randn(1, 1024, 2)
    exact = loop(a.double(), b.double(), torch.zeros(1, 2).double())
    torch.testing.assert_close(scan(a, b, torch.zeros(1, 2)).double(), exact, rtol=1e-5, atol=1e-4)


def test_if_all_experts_are_chosen_their_outputs_are_averaged_with_the_router_s_weights():
    torch.manual_seed(0)
    experts = Experts([MLP(16, 8, "gelu", 0.0, True) for _ in range(3)], 16, top_k=3).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    outputs = torch.stack([expert(x) for expert in experts.experts], -1)  # (B, T, C, E)
    expected = (outputs * experts.router(x).softmax(-1)[:, :, None]).sum(-1)
    torch.testing.assert_close(experts(x), expected, rtol=0, atol=1e-12)


def test_each_token_uses_the_experts_that_the_router_prefers():
    torch.manual_seed(0)
    experts = Experts([MLP(16, 8, "gelu", 0.0, True) for _ in range(4)], 16, top_k=1).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    shares = experts.router(x).softmax(-1)
    for b, t in ((0, 0), (1, 4)):
        weight, number = shares[b, t].max(-1)
        torch.testing.assert_close(experts(x)[b, t], weight * experts.experts[number](x[b, t]), rtol=0, atol=1e-12)


def test_the_balancing_loss_is_1_for_equal_use_and_adds_to_the_training_loss():
    experts = Experts([MLP(4, 8, "gelu", 0.0, False) for _ in range(4)], 4, top_k=1)
    experts.router.weight.data = 50 * torch.eye(4)
    experts(torch.eye(4)[None])  # one token for each expert
    assert experts.balance_loss.item() == pytest.approx(1)
    experts(torch.eye(4)[None, :1].expand(1, 4, 4))  # all tokens for the first
    assert experts.balance_loss.item() == pytest.approx(4)

    net, (idx, targets) = make(MixtureOfExperts, {"balance_weight": 0.5}), torch.randint(11, (2, 4, 8))
    loss, plain = net.loss(idx, targets), F.cross_entropy(net(idx).flatten(0, 1), targets.flatten())
    added = sum(block.mlp.balance_loss for block in net.blocks) / len(net.blocks)
    assert added >= 1 - 1e-6
    torch.testing.assert_close(loss, plain + 0.5 * added)


@pytest.mark.parametrize("top_k", [1, 2])
def test_flops_are_those_that_torch_counts(top_k):
    net = MixtureOfExperts(64, 16, n_layer=3, n_embd=32, mlp="swiglu", top_k=top_k)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        net(torch.zeros(1, 16, dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(16 * net.flops_per_token(), rel=1e-6)


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_number_of_chosen_experts_must_fit(top_k):
    with pytest.raises(UserError, match=f"from 1 to num_experts 4, got {top_k}"):
        MixtureOfExperts(11, 8, top_k=top_k)


@pytest.mark.parametrize("kind", [GatedRecurrence, MixtureOfExperts])
def test_a_run_s_checkpoint_generates_the_same_text(corpus_file, kind):
    pl.seed_everything(1, verbose=False)
    model = LanguageModel(net=partial(kind, n_layer=1, n_embd=32))
    data = tiny.data(corpus_file)
    trainer = pl.Trainer(max_steps=5, gradient_clip_val=1.0, enable_checkpointing=False, **tiny.QUIET)
    trainer.fit(model, datamodule=data)
    scores = trainer.validate(model, datamodule=data, verbose=False)[0]
    assert 0 < scores["val/nats_per_char"] < 4
    trainer.save_checkpoint("run.ckpt")

    loaded = LanguageModel.load_from_checkpoint("run.ckpt", net=kind)
    assert loaded.net.config["n_embd"] == 32
    prompts = ["MIRA:", "", "OLD GARDENER:\n"]
    assert loaded.generate(prompts, max_new_tokens=30) == model.generate(prompts, max_new_tokens=30)


def test_their_arguments_are_flags(capsys):
    flags = ["--model.net.n_layer=2", "--model.net.num_experts=3", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", "--model.net=mixture_of_experts.MixtureOfExperts", *flags])
    printed = capsys.readouterr().out
    assert "num_experts: 3" in printed and "n_layer: 2" in printed


@pytest.mark.parametrize("path", sorted(NETWORKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_network_is_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 120
