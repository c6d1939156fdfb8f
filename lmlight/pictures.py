"""Matplotlib figures of a net and its training, from plain arrays. Independent of torch and Lightning.

Each figure has a white background, so that it is readable on light and dark pages. Figures for TensorBoard are at most
350 pixels wide where possible, the width at which it shows images. Each figure sets its own layout, because a notebook may
have changed the default.
"""

import math
import unicodedata
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure

Floats = npt.NDArray[np.floating]

SYMBOLS = {"\n": "↵", "\t": "⇥", "\r": "←", " ": "▁"}
CHARACTER_WIDTH = 0.602  # of DejaVu Sans Mono, relative to its size
AXES = {
    "step": "optimizer steps",
    "characters": "characters of training text seen",
    "seconds": "seconds of training, without validation",
}

# Matplotlib draws characters that its font lacks as boxes, and would warn about each
warnings.filterwarnings("ignore", message="Glyph .* missing from")


def visible(piece: str, max_length: int = 12) -> str:
    """A token as a label, with symbols for white space and control characters."""
    symbols = [SYMBOLS.get(c, "·" if unicodedata.category(c).startswith("C") else c) for c in piece]
    shown = symbols if len(symbols) <= max_length else [*symbols[: max_length - 1], "…"]
    return "".join(shown).replace("$", r"\$")  # Matplotlib would start a formula


def token_matrix(
    matrix: Floats, labels: Sequence[str], caption: str, inches: float = 3.5, vmax: float | None = None
) -> Figure:
    """A matrix with the same tokens in rows and columns, such as attention weights: queries in rows, keys in columns."""
    figure = Figure(figsize=(inches, inches), dpi=100, facecolor="white")
    figure.set_layout_engine("none")
    margin = 0.35 / inches + 0.09
    axes = figure.add_axes((margin, 0.02, 0.98 - margin, 0.98 - margin))
    axes.imshow(matrix, cmap="viridis", vmin=0.0, vmax=vmax)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6.5, family="monospace")
    axes.set_yticks(range(len(labels)), labels, fontsize=6.5, family="monospace")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2)
    figure.text(0.01, 0.98, caption, fontsize=6, va="top")
    return figure


def loss_by_token(pieces: Sequence[str], nats: Floats, width: int = 42) -> Figure:
    """Text with the loss of each token, (N,) nats, as background color."""
    lines: list[list[tuple[str, float]]] = [[]]
    nats = np.nan_to_num(nats, posinf=float(np.max(nats, initial=0, where=np.isfinite(nats))))
    for piece, value in zip(pieces, nats):
        for character in piece.replace("▁", " "):
            lines[-1].append((" " if character == " " else visible(character)[-1], float(value)))
            if character == "\n" or len(lines[-1]) == width:
                lines.append([])
    lines = [line for line in lines if line]
    colors, red = colormaps["YlOrRd"], max(1.0, math.ceil(float(np.quantile(nats, 0.98))))
    fontsize = 8 * 72 / (100 * CHARACTER_WIDTH)  # characters 8 pixels wide, because they start at whole pixels
    text_width, text_height = width * CHARACTER_WIDTH * fontsize / 72, len(lines) * 1.6 * fontsize / 72  # inches
    w, h = text_width + 0.1, text_height + 0.4
    figure = Figure(figsize=(w, h), dpi=100, facecolor="white")
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.05 / w, 0.1 / h, text_width / w, text_height / h))
    background = np.ones((len(lines), width, 3))
    for row, line in enumerate(lines):
        characters, values = zip(*line)
        background[row, : len(line)] = colors(0.75 * np.minimum(1.0, np.array(values) / red))[:, :3]
        text = "".join(characters)
        axes.text(0, row + 0.52, text, family="monospace", fontsize=fontsize, va="center", parse_math=False)
    axes.imshow(background, aspect="auto", extent=(0, width, len(lines), 0))
    axes.set_axis_off()
    axes.set_title(f"nats per token: pale yellow 0, red {red:.0f}; mean {np.mean(nats):.2f}", fontsize=7, loc="left")
    return figure


def loss_by_position(nats: Floats) -> Figure:
    """Mean loss at each position of the block, (T,): how much context helps."""
    figure = Figure(figsize=(3.5, 2.4), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(nats) + 1), nats, color="tab:blue", linewidth=1)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("tokens of context", fontsize=7)
    axes.set_ylabel("validation loss, nats per token", fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], x: str = "step") -> Figure:
    """The validation loss of one or more runs and, dashed, the loss on a subset of the training text.

    Args:
        runs: the validations of each run, by run name; a validation maps `x` and metric names to values.
        x: `step`, `characters` or `seconds`.
    """
    figure = Figure(figsize=(7.5, 4.5), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots()
    unit = "character" if any("val/nats_per_char" in row for rows in runs.values() for row in rows) else "token"
    loss = "val/nats_per_char" if unit == "character" else "val/loss"
    for number, (name, rows) in enumerate(runs.items()):
        for column, style, label in ((loss, ".-", _label(name, 200)), ("train_subset/nats_per_char", ".--", None)):
            points = [(row[x], row[column]) for row in rows if math.isfinite(row.get(column, math.nan))]
            if points:
                axes.plot(*zip(*points), style, color=f"C{number}", label=label)
    axes.set(xlabel=AXES[x], ylabel=f"nats per {unit}")
    axes.set_title("validation text; dashed: a subset of the training text", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def strip_plot(settings: Sequence[tuple[str, Sequence[float], tuple[float, float, float]]]) -> Figure:
    """The losses of the runs with each setting, and their mean with its confidence interval.

    Args:
        settings: name, losses, and (mean, low, high) of each, the best one first; an infinite interval is not drawn.
    """
    figure = Figure(figsize=(7.5, 1.2 + 0.35 * len(settings)), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for row, (_, losses, (mean, low, high)) in enumerate(settings):
        color = colormaps["tab20"](row % 20)
        axes.plot(losses, [row] * len(losses), "o", color=color, alpha=0.6, markersize=5)
        if math.isfinite(high - low):
            axes.errorbar(mean, row + 0.25, xerr=[[mean - low], [high - mean]], fmt="|", color=color, capsize=4)
    axes.set_yticks(range(len(settings)), [_label(name) for name, *_ in settings], fontsize=8)
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlabel("nats per character; bars: mean and 95% confidence interval", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    return figure


def mean_curves(settings: Sequence[tuple[str, Sequence[Sequence[Mapping[str, float]]]]]) -> Figure:
    """For each setting, the mean loss of its runs at each step, with a band from the lowest to the highest.

    Args:
        settings: name and runs of each; a run is its validations, see `learning_curves`.
    """
    figure = Figure(figsize=(7.5, 4.5), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(settings):
        losses: dict[float, list[float]] = {}
        for row in (row for run in runs for row in run):
            losses.setdefault(row["step"], []).append(row["val/nats_per_char"])
        steps = sorted(step for step, values in losses.items() if len(values) == len(runs))
        means, lows, highs = ([float(f(losses[step])) for step in steps] for f in (np.mean, np.min, np.max))
        color = colormaps["tab20"](number % 20)
        axes.plot(steps, means, ".-", color=color, label=_label(name))
        axes.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel=AXES["step"], ylabel="nats per character")
    axes.set_title("lines: means over the seeds; bands: lowest to highest", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _label(name: str, max_length: int = 60) -> str:
    label = visible(name or "all runs", max_length).replace(SYMBOLS[" "], " ")
    return f"\u200b{label}" if label.startswith("_") else label  # Matplotlib hides labels that start with _
