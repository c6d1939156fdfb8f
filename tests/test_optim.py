"""Parameter groups, Muon and learning-rate schedules."""

import copy
import math
import pickle

import pytest
import torch

from lmlight.errors import UserError
from lmlight.models import GPT2, Bigram, Transformer
from lmlight.optim import (
    QUINTIC_COEFFICIENTS,
    Muon,
    Schedule,
    apply_changes,
    hyperparameters,
    label_in_order,
    orthogonalize,
    parameter_groups,
)


def test_parameter_groups():
    """Every parameter is in one group, and only matrices decay."""
    net = Transformer(11, 8, n_layer=1, n_head=2, n_embd=16, **GPT2)
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=1e-3, weight_decay=0.1)
    groups = {
        id(p): (group["name"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(groups) == len(list(net.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in net.named_parameters():
        if name in ("embedding.weight", "positions.weight"):
            assert groups[id(parameter)] == ("embeddings", 0.1)
        else:
            assert groups[id(parameter)] == (("hidden", 0.1) if parameter.dim() == 2 else ("vectors", 0.0))
    untied = Transformer(11, 8, n_layer=1, n_head=2, n_embd=16)
    assert any(untied.head.weight is p for p in parameter_groups(untied)[1]["params"])
    assert [group["name"] for group in parameter_groups(Bigram(11, 8))] == ["embeddings"]


def test_hidden_layers_as_wide_as_the_vocabulary_stay_hidden():
    """`mlp.up` has 64 outputs here, and so has the head."""
    net, other = (Transformer(size, 8, n_layer=1, n_head=2, n_embd=16) for size in (64, 63))
    for group, expected in zip(parameter_groups(net), parameter_groups(other), strict=True):
        assert (group["name"], len(group["params"])) == (expected["name"], len(expected["params"]))
    assert any(net.head.weight is parameter for parameter in parameter_groups(net)[1]["params"])


class WithTensors(Bigram):
    """A network with weights of three dimensions."""

    def __init__(self, vocab_size, block_size):
        super().__init__(vocab_size, block_size)
        self.conv, self.experts = torch.nn.Conv1d(4, 4, 2, groups=4), torch.nn.Parameter(torch.ones(3, 4, 5))


def test_muon_leaves_weights_of_more_than_two_dimensions_to_adamw():
    nets = [WithTensors(11, 8), WithTensors(11, 8)]
    nets[1].load_state_dict(nets[0].state_dict())
    assert [group["name"] for group in parameter_groups(nets[0])] == ["embeddings", "tensors", "vectors"]
    for net, kind in zip(nets, (Muon, torch.optim.AdamW)):
        optimizer = kind(parameter_groups(net), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16), (1, 32, 32)])
def test_orthogonalize_approximates_the_polar_factor(shape):
    torch.manual_seed(0)
    given = torch.randn(shape, dtype=torch.float64)
    made = orthogonalize(given)
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    # diagonal in the basis of the singular vectors, with entries near 1 unless the singular value is tiny
    inside = u.mT @ made @ v.mT
    diagonal = inside.diagonal(dim1=1, dim2=2)
    assert torch.allclose(inside, torch.diag_embed(diagonal), atol=1e-9)
    expected = s / s.norm(dim=1, keepdim=True)
    for a, b, c in QUINTIC_COEFFICIENTS:
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(diagonal, expected, rtol=0, atol=1e-5)
    large = diagonal[s / s.norm(dim=1, keepdim=True) > 1 / 50]
    assert large.min() > 0.55 and large.max() < 1.2
    assert diagonal.min() > 0


def test_muon_matches_a_reference_implementation():
    torch.manual_seed(0)
    ours, plain = (Transformer(11, 8, n_layer=1, n_head=2, n_embd=16).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizer = Muon(parameter_groups(ours), lr=1e-2, weight_decay=0.1, momentum=0.9)
    adamw = torch.optim.AdamW(parameter_groups(plain)[1:], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    hidden = parameter_groups(plain)[0]["params"]
    momenta = [torch.zeros_like(parameter) for parameter in hidden]
    for _ in range(3):
        gradients = [torch.randn_like(parameter) for parameter in ours.parameters()]
        for net in (ours, plain):
            for parameter, gradient in zip(net.parameters(), gradients):
                parameter.grad = gradient.clone()
        optimizer.step()
        adamw.step()
        with torch.no_grad():
            for parameter, momentum in zip(hidden, momenta):
                momentum.mul_(0.9).add_(parameter.grad, alpha=0.1)
                nesterov = 0.1 * parameter.grad + 0.9 * momentum
                parameter.mul_(1 - 1e-2 * 0.1)
                parameter -= 1e-2 * 0.2 * max(parameter.shape) ** 0.5 * orthogonalize(nesterov[None])[0]
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_muon_moves_loaded_step_counts_to_the_device():
    """Checkpoints are read on the CPU, but the fused kernel needs the state on the device of the parameter."""
    before, after = (torch.nn.Parameter(torch.ones(4, device=device)) for device in ("cpu", "meta"))
    before.grad = torch.ones(4)
    first = Muon([before])
    first.step()
    after.grad = torch.ones(4, device="meta")
    resumed = Muon([after])
    resumed.load_state_dict(first.state_dict())
    resumed.step()
    assert resumed.state[after]["step"].device.type == "meta"


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_muon_step_alike(make_copy):
    parameters = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))]
    optimizer = Muon([{"params": parameters[:1], "name": "hidden"}, {"params": parameters[1:]}], betas=(0.5, 0.6))
    copied = make_copy(optimizer)
    copies = [parameter for group in copied.param_groups for parameter in group["params"]]
    for parameter in (*parameters, *copies):
        parameter.grad = torch.arange(1.0, parameter.numel() + 1).view_as(parameter)
    optimizer.step()
    copied.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    assert not torch.equal(parameters[1], torch.ones(4))


@pytest.mark.parametrize("momentum", [-0.5, 1.0])
def test_momentum_that_would_not_train_is_refused(momentum):
    with pytest.raises(ValueError, match="momentum must be in"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], momentum=momentum)


def test_muon_without_named_groups_is_adamw():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    a.grad, b.grad = torch.ones(4, 4), torch.ones(4, 4)
    Muon([a], lr=1e-2, weight_decay=0.1).step()
    torch.optim.AdamW([b], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)).step()
    assert torch.allclose(a, b)


def test_optimizer_state_labelled_in_model_order_loads():
    net = Transformer(11, 8, n_layer=2, n_head=2, n_embd=16)
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer, other = (Muon(parameter_groups(net), lr=0.0) for _ in range(2))
    optimizer.step()
    state = optimizer.state_dict()
    label_in_order(state, optimizer, net.parameters())
    labels = [label for group in state["param_groups"] for label in group["params"]]
    assert sorted(labels) == list(range(len(labels))) != labels
    for place, parameter in enumerate(net.parameters()):
        assert state["state"][place] == optimizer.state[parameter]
    other.load_state_dict(state)
    for parameter in net.parameters():
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][name], value)


def test_schedule_shapes():
    for shape in ("linear", "cosine", "decay"):
        schedule = Schedule(shape, warmup_steps=4, decay_fraction=0.5, final_factor=0.1)
        assert [schedule.factor(s, 100) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert schedule.factor(4, 100) == pytest.approx(1.0)
        assert schedule.factor(100, 100) == pytest.approx(0.1)
        factors = [schedule.factor(s, 100) for s in range(4, 101)]
        assert factors == sorted(factors, reverse=True)
    assert Schedule("linear", 0).factor(25, 100) == pytest.approx(0.75)
    assert Schedule("cosine", 0).factor(25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert Schedule("decay", 0, 0.5).factor(50, 100) == 1
    assert Schedule("decay", 0, 0.5).factor(75, 100) == pytest.approx(0.5)
    assert Schedule("constant", 2).factor(10**9, -1) == 1


def test_falling_schedule_needs_an_end():
    with pytest.raises(UserError, match="max_steps"):
        Schedule("cosine", 0).factor(5, -1)


@pytest.mark.parametrize("setting", [{"warmup_steps": -1}, {"decay_fraction": 2.0}, {"final_factor": -0.1}], ids=str)
def test_values_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Schedule(**setting)


def test_changed_learning_rate_keeps_the_factor_of_any_scheduler():
    def after_three_steps(lr):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr)
        at_the_start, scheduler = hyperparameters(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        return scheduler, at_the_start

    (scheduler, before), (expected, now) = after_three_steps(0.1), after_three_steps(0.4)
    apply_changes(scheduler, now, before)
    assert scheduler.optimizer.param_groups[0] | {"params": []} == expected.optimizer.param_groups[0] | {"params": []}
