import math

import pytest
import torch

from lmlight.errors import UserError
from lmlight.models import GPT2, Transformer
from lmlight.optim import Schedule, parameter_groups


def test_groups_hold_every_parameter_once_and_matrices_alone_decay():
    net = Transformer(11, 8, n_layer=1, n_head=2, n_embd=16, **GPT2)
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(net.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for parameter in net.parameters():
        assert decay[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0)


def test_grouped_steps_are_those_of_torch_without_groups():
    """Without decay the groups must make no difference."""
    torch.manual_seed(0)
    ours, plain = (Transformer(11, 8, n_layer=1, n_head=2, n_embd=16) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizers = (
        torch.optim.AdamW(parameter_groups(ours), lr=1e-2, weight_decay=0.0),
        torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0),
    )
    idx = torch.randint(11, (4, 8))
    for net, optimizer in zip((ours, plain), optimizers):
        for _ in range(3):
            optimizer.zero_grad()
            net(idx).logsumexp(-1).mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(a, b)


def test_warm_up_rises_linearly_then_each_shape_falls_to_its_end():
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


def test_a_falling_schedule_needs_an_end():
    with pytest.raises(UserError, match="max_steps"):
        Schedule("cosine", 0).factor(5, -1)


@pytest.mark.parametrize("setting", [{"warmup_steps": -1}, {"decay_fraction": 2.0}, {"final_factor": -0.1}], ids=str)
def test_values_out_of_range_are_named(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Schedule(**setting)
