"""TextLoss against sums in plain Python."""

import math

import pytest
import torch

from lmlight.data.loader import IGNORE_INDEX
from lmlight.training.metrics import TextLoss

SHAPES = [(3, 7), (1, 2), (4, 1)]


def batches(seed=0):
    """Batches (losses, targets, target_chars) of unequal sizes, some with positions that are not scored."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        losses = 5 * torch.rand(shape, generator=generator)
        targets = torch.randint(0, 50, shape, generator=generator)
        chars = torch.randint(0, 6, shape, generator=generator)
        unscored = torch.rand(shape, generator=generator) < 0.3
        unscored[0, 0] = False
        yield (
            losses.masked_fill(unscored, 0),
            targets.masked_fill(unscored, IGNORE_INDEX),
            chars.masked_fill(unscored, 0),
        )


def plain_sums(all_batches):
    nats = tokens = characters = 0
    for losses, targets, chars in all_batches:
        for loss, target, count in zip(losses.flatten().tolist(), targets.flatten().tolist(), chars.flatten().tolist()):
            if target != IGNORE_INDEX:
                nats, tokens, characters = nats + loss, tokens + 1, characters + count
    return nats, tokens, characters


def test_batches_are_summed_and_divided_once():
    metric = TextLoss()
    for batch in batches():
        metric.update(*batch)
    nats, tokens, characters = plain_sums(batches())
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == pytest.approx(
        {
            "loss": nats / tokens,
            "perplexity": math.exp(nats / tokens),
            "nats_per_char": nats / characters,
            "bpc": nats / characters / math.log(2),
            "characters": characters,
        }
    )
    mean_of_means = sum(plain_sums([batch])[0] / plain_sums([batch])[1] for batch in batches()) / len(SHAPES)
    assert result["loss"] != pytest.approx(mean_of_means)


def test_states_of_two_ranks_merge():
    first, second, alone = TextLoss(), TextLoss(), TextLoss()
    for metric, seed in ((first, 1), (second, 2), (alone, 1), (alone, 2)):
        for batch in batches(seed):
            metric.update(*batch)
    first.merge_state(second)
    assert {name: value.item() for name, value in first.compute().items()} == pytest.approx(
        {name: value.item() for name, value in alone.compute().items()}
    )


def test_sums_are_exact_in_half_precision():
    """Lightning's `bf16-true` converts the states of metrics, too."""
    metric = torch.nn.ModuleDict({"loss": TextLoss()}).to(torch.bfloat16)["loss"]
    for _ in range(500):
        metric.update(torch.full((1, 2048), 2.0), torch.ones(1, 2048, dtype=torch.int64), torch.ones(1, 2048))
    assert metric.compute()["loss"] == 2
    assert metric.compute()["characters"] == 500 * 2048


def test_reset_forgets():
    metric = TextLoss()
    metric.update(torch.full((1, 1), 100.0), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    metric.reset()
    metric.update(torch.full((1, 1), 2.0), torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 4))
    result = metric.compute()
    assert (result["loss"].item(), result["nats_per_char"].item(), result["characters"].item()) == (2, 0.5, 4)


def test_fractional_character_counts():
    """The counts of a lossy tokenizer are scaled to the original text, so they are fractions."""
    metric = TextLoss()
    metric.update(
        torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), torch.tensor([[1.25, 1.5]], dtype=torch.float64)
    )
    assert metric.compute()["characters"].item() == 2.75


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS has no float64")
def test_sums_are_float64():
    metric = TextLoss()
    one = torch.zeros(1, 1, dtype=torch.long)
    metric.update(torch.full((1, 1), 2.0**24), one, one + 1)
    for _ in range(10):
        metric.update(torch.full((1, 1), 0.5), one, one + 1)
    assert metric.nats.item() == 2**24 + 5
