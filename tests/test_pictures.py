"""Contents of figures."""

import math
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex

from lmlight import pictures


def image_of(figure, axes=0):
    return figure.axes[axes].images[0].get_array()


def test_token_matrix_has_tokens_on_both_axes():
    weights = np.tril(np.ones((3, 3))) / np.arange(1, 4)[:, None]
    figure = pictures.token_matrix(weights, ["a", "▁b", "↵"], "")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "▁b", "↵"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "▁b", "↵"]
    assert np.array_equal(image_of(figure), weights), "query tokens in rows"


def test_surprising_tokens_are_redder_and_lines_are_kept():
    figure = pictures.loss_by_token(["▁no", "▁way", "\n", "x"], np.array([0.0, 4.0, 0.0, 2.0]), width=12)
    ground = image_of(figure)
    assert ground.shape[:2] == (2, 12)
    assert [text.get_text() for text in figure.axes[0].texts] == [" no way↵", "x"]
    assert len({to_hex(shade) for shade in ground[0, :3]}) == 1, "one color per token"
    whiteness = ground.sum(-1)
    assert whiteness[0, 0] > whiteness[1, 0] > whiteness[0, 4]
    assert (ground[0, 8:] == 1).all(), "white after the end of the line"


def test_values_that_are_not_finite_can_be_drawn():
    ground = image_of(pictures.loss_by_token(["a", "b", "c"], np.array([math.nan, math.inf, 1.0]), width=3))
    assert (ground[0, 0] == ground[0, 0]).all() and ground[0, 1].tolist() == ground[0, 2].tolist()
    pictures.loss_by_token(["a"], np.array([math.nan]))


def test_long_line_is_wrapped():
    figure = pictures.loss_by_token(["abcdefgh"], np.ones(1), width=5)
    assert [text.get_text() for text in figure.axes[0].texts] == ["abcde", "fgh"]


def test_loss_by_position_counts_from_one():
    figure = pictures.loss_by_position(np.array([3.0, 2.0, 1.5]))
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1, 3.0], [2, 2.0], [3, 1.5]]


@pytest.mark.parametrize("x", ["step", "characters", "seconds"])
def test_learning_curves_share_an_axis(x):
    rows = [{"step": 1.0, "characters": 10.0, "seconds": 5.0, "val/nats_per_char": 2.0}]
    rows += [
        {"step": 2.0, "characters": 20.0, "seconds": 9.0, "val/nats_per_char": 1.5, "train_subset/nats_per_char": 1.0}
    ]
    figure = pictures.learning_curves({"one": rows, "two": rows[:1]}, x)
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[rows[0][x], 2.0], [rows[1][x], 1.5]],
        [[rows[1][x], 1.0]],
        [[rows[0][x], 2.0]],
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert axes.get_xlabel() == pictures.AXES[x]


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("\n", "↵"),
        ("▁the", "▁the"),
        ("a b", "a▁b"),
        ("\x00", "·"),
        ("$x$", r"\$x\$"),
        ("a" * 20, "a" * 11 + "…"),
        ("$" * 20, r"\$" * 11 + "…"),
    ],
)
def test_labels_make_control_characters_visible(piece, shown):
    assert pictures.visible(piece) == shown
    figure = pictures.token_matrix(np.ones((1, 1)), [pictures.visible(piece)], "")
    figure.draw_without_rendering()  # an unfinished formula would raise


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pictures.token_matrix(np.eye(2), ["a", "b"], ""),
        lambda: pictures.loss_by_token(["a"], np.ones(1)),
        lambda: pictures.loss_by_position(np.ones(2)),
    ],
)
def test_figures_do_not_depend_on_the_layout_of_a_notebook(draw):
    with mpl.rc_context({"figure.constrained_layout.use": True}), warnings.catch_warnings():
        warnings.simplefilter("error")
        draw().draw_without_rendering()
