"""`lmlight curves RUN...`: the learning curves of several runs in one picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmlight import curves
from lmlight.command_line import Parser
from lmlight.errors import UserError, say


def main(args: Sequence[str]) -> None:
    """Runs `lmlight curves`.

    Of several runs, those that cannot be drawn are left out, each with a line on stderr.

    Raises:
        UserError: no run can be drawn; the picture cannot be written.
    """
    parser = Parser("lmlight curves", description="Draws the validation losses of runs in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, such as runs/*; others are left out")
    parser.add_argument("--x", choices=("step", "characters", "seconds"), default="step", help="the horizontal axis")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="the picture: .png, .svg or .pdf")
    options = parser.parse_args(args)
    runs, left_out = dict[str, list[dict[str, Any]]](), list[UserError]()
    names = Counter(_name(run) for run in options.runs)
    for run in options.runs:
        try:
            runs[_name(run) if names[_name(run)] == 1 else str(run)] = _drawable(run, options.x)
        except UserError as error:
            left_out.append(error)
    if not runs:
        others = f" ({len(left_out) - 1} more cannot be drawn either)" if len(left_out) > 1 else ""
        raise UserError(f"{left_out[0]}{others}")
    for reason in left_out:
        say(reason, "left out")
    from lmlight import pictures  # Matplotlib takes a third of a second to import

    try:
        pictures.learning_curves(runs, options.x).savefig(options.output)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"'{options.output}' cannot be written ({why}): pass another --output") from None
    for name, rows in runs.items():
        best = min(row["val/nats_per_char"] for row in rows)
        print(f"{name}: best {best:.4f} nats per character, {len(rows)} validations")
    print(f"Picture: {options.output}")


def _name(run: Path) -> str:
    return run.absolute().name


def _drawable(run: Path, x: str) -> list[dict[str, Any]]:
    """The validations of a run that have a finite score and a place on the horizontal axis.

    Raises:
        UserError: see `read`; it has none.
    """
    names = (x, "val/nats_per_char")
    rows = [row for row in curves.read(run) if all(_is_finite(row.get(name)) for name in names)]
    if not rows:
        raise UserError(f"'{run}' has no validation with a finite score and {x}")
    return rows


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
