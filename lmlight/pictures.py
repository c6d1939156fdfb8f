"""Pictures of a net and of its training, as Matplotlib figures from plain arrays. Knows neither torch nor Lightning.

Each figure has a white ground of its own, so that it reads on a light page and on a dark one, and as far as it can is no
wider than the 350 pixels that TensorBoard gives a picture.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure

Floats = npt.NDArray[np.floating]

SHOWN = {"\n": "↵", "\t": "⇥", "\r": "←", " ": "▁"}
CELL = 0.602  # the width of a character of DejaVu Sans Mono, in its height
AXES = {"step": "optimizer steps", "characters": "characters of training text seen", "seconds": "seconds"}

# a text in a script that Matplotlib's own font lacks is drawn as boxes: no reason to say so once a glyph
warnings.filterwarnings("ignore", message="Glyph .* missing from")


def visible(piece: str, most: int = 12) -> str:
    """A token for a label: line breaks and control characters as signs, at most so many characters."""
    signs = [SHOWN.get(c, "·" if unicodedata.category(c).startswith("C") else c) for c in piece]
    text = "".join(signs).replace("$", r"\$")  # Matplotlib would begin a formula
    return text if len(text) <= most else text[: most - 1] + "…"


def attention_map(weights: Floats, labels: Sequence[str]) -> Figure:
    """One head's attention weights (T, T): who looks (rows) at whom (columns)."""
    figure = Figure(figsize=(3.5, 3.5), dpi=100, facecolor="white")
    axes = figure.add_axes((0.19, 0.03, 0.79, 0.79))
    axes.imshow(weights, cmap="viridis", vmin=0.0, vmax=1.0)
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=90, fontsize=6.5, family="monospace")
    axes.set_yticks(places, labels, fontsize=6.5, family="monospace")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2)
    figure.text(0.01, 0.98, "a row looks\nat columns", fontsize=6, va="top")
    return figure


def surprise(pieces: Sequence[str], nats: Floats, width: int = 42) -> Figure:
    """A text, each token (N,) on the colour of how surprising it was, in nats."""
    lines: list[list[tuple[str, float]]] = [[]]
    for piece, value in zip(pieces, nats):
        for character in piece.replace("▁", " "):
            sign = " " if character == " " else visible(character)[-1:]
            lines[-1].append((sign, float(value)))
            if character == "\n" or len(lines[-1]) == width:
                lines.append([])
    lines = [line for line in lines if line]
    ground = np.ones((len(lines), width, 3))
    shades = colormaps["YlOrRd"]
    most = max(1.0, math.ceil(float(np.quantile(nats, 0.98))))
    for row, line in enumerate(lines):
        for column, (_, value) in enumerate(line):
            ground[row, column] = shades(0.75 * min(1.0, value / most))[:3]
    size = 8 * 72 / (100 * CELL)  # points; a character is 8 pixels wide, for they are set at whole ones
    wide, high = width * CELL * size / 72, len(lines) * 1.6 * size / 72
    figure = Figure(figsize=(wide + 0.1, high + 0.4), dpi=100, facecolor="white")
    axes = figure.add_axes((0.05 / (wide + 0.1), 0.1 / (high + 0.4), wide / (wide + 0.1), high / (high + 0.4)))
    axes.imshow(ground, aspect="auto", extent=(0, width, len(lines), 0))
    for row, line in enumerate(lines):
        text = "".join(sign for sign, _ in line)
        axes.text(0, row + 0.52, text, family="monospace", fontsize=size, va="center", parse_math=False)
    axes.set_axis_off()
    mean = float(np.mean(nats))
    axes.set_title(f"nats per token: white 0, red {most:.0f}; mean {mean:.2f}", fontsize=7, loc="left")
    return figure


def loss_by_position(nats: Floats) -> Figure:
    """The mean loss (T,) at each position of the block: how much the context helps."""
    figure = Figure(figsize=(3.5, 2.4), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(nats) + 1), nats, color="tab:blue", linewidth=1)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("tokens of context", fontsize=7)
    axes.set_ylabel("validation loss, nats per token", fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def bigram_table(probabilities: Floats, labels: Sequence[str]) -> Figure:
    """What follows what: (K, K) probabilities, a row for each token that came."""
    figure = Figure(figsize=(6.5, 6.5), dpi=100, facecolor="white")
    axes = figure.add_axes((0.14, 0.03, 0.83, 0.83))
    axes.imshow(probabilities, cmap="viridis", vmin=0.0, vmax=float(np.quantile(probabilities, 0.995)))
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")
    axes.set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2)
    figure.text(0.01, 0.98, "after a row\ncome columns", fontsize=7, va="top")
    return figure


def positions(vectors: Floats) -> Figure:
    """The learned vectors of the positions (T, C), and how alike they are (cosine)."""
    figure = Figure(figsize=(7, 3.2), dpi=100, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    most = float(np.abs(vectors).max()) or 1.0
    left.imshow(vectors, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    left.set(xlabel="channel", ylabel="position", title="learned positions")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = vectors @ vectors.T / np.maximum(lengths * lengths.T, 1e-12)
    shown = right.imshow(alike, cmap="RdBu", vmin=-1, vmax=1)
    right.set(xlabel="position", ylabel="position", title="how alike (cosine)")
    figure.colorbar(shown, ax=right)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], x: str = "step") -> Figure:
    """The validation loss of one or more runs, and the loss on training text measured the same way, dashed.

    Args:
        runs: the name of each, and its validations, as `curves.read` gives them.
        x: `step`, `characters` or `seconds`.
    """
    figure = Figure(figsize=(7.5, 4.5), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for name, rows in runs.items():
        shade = None
        for column, style, label in (("val/nats_per_char", ".-", name), ("train_sample/nats_per_char", ".--", None)):
            points = [(row[x], row[column]) for row in rows if row.get(column) is not None and row.get(x) is not None]
            if points:
                (line,) = axes.plot(*zip(*points), style, color=shade, label=label)
                shade = line.get_color()
    axes.set(xlabel=AXES[x], ylabel="nats per character")
    axes.set_title("validation text; dashed: a sample of the training text", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure
