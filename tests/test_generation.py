import pytest
import torch

from lmlight.errors import UserError
from lmlight.generation import Sampling, filter_logits, generate
from lmlight.models import Bigram, Transformer


def test_greedy_follows_the_likeliest():
    net = Bigram(5, 4)
    out = generate(net, torch.tensor([[3]]), Sampling(max_new_tokens=6, temperature=0))
    token, expected = 3, [3]
    for _ in range(6):
        token = int(net.table.weight[token].argmax())
        expected.append(token)
    assert out.tolist() == [expected]


def test_a_seed_gives_the_same_again_and_moves_no_other_random_numbers():
    net = Bigram(50, 4)
    start = torch.tensor([[3]])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = generate(net, start, Sampling(max_new_tokens=20, seed=5))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, generate(net, start, Sampling(max_new_tokens=20, seed=5)))
    assert not torch.equal(first, generate(net, start, Sampling(max_new_tokens=20, seed=6)))


def test_context_is_cropped_to_the_block():
    torch.manual_seed(0)
    net = Transformer(11, 4, n_layer=1, n_head=2, n_embd=16).eval()
    long, short = torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), torch.tensor([[4, 5, 6, 7]])
    sampling = Sampling(max_new_tokens=5, temperature=0)
    assert torch.equal(generate(net, long, sampling)[:, 7:], generate(net, short, sampling)[:, 4:])


def test_samples_follow_the_probabilities():
    """Chi-square over 20,000 draws, 5 degrees of freedom: above 20.5 in one case of a thousand, and the seed is fixed."""
    net = Bigram(6, 4)
    net.table.weight.data[0] = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5])
    expected = (net.table.weight[0] / 0.8).softmax(-1) * 20_000
    drawn = generate(net, torch.zeros(20_000, 1, dtype=torch.long), Sampling(max_new_tokens=1, temperature=0.8))
    counts = torch.bincount(drawn[:, 1], minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_top_k_keeps_the_likeliest():
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert filter_logits(logits, Sampling(top_k=2)).isfinite().tolist() == [[False, True, True, False]]
    assert filter_logits(logits, Sampling(top_k=99)).isfinite().all()


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for top_p, kept in ((0.4, {1}), (0.51, {1, 3}), (0.76, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        finite = filter_logits(logits, Sampling(top_p=top_p)).isfinite()[0]
        assert set(finite.nonzero().flatten().tolist()) == kept


def test_temperature_comes_before_top_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    # hot enough to be nearly uniform: half the mass takes more than one token
    assert filter_logits(logits, Sampling(temperature=100, top_p=0.5)).isfinite().sum() >= 2


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": -1},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)
