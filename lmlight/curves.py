"""A run's validations as a table, `metrics.csv`, and `lmlight curves RUN...`: the curves of several in one picture.

The table has a row for each validation, with the step, the characters of training text seen, the seconds, and every figure.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmlight import files
from lmlight.errors import UserError

TABLE, PICTURE = "metrics.csv", "curve.png"


def write(rows: Sequence[Mapping[str, Any]], run: Path) -> None:
    """Puts the table into a run's folder, in place of the one before."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with files.whole(run / TABLE) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def read(run: Path) -> list[dict[str, float | None]]:
    """The rows of a run's table; None where a figure is not given.

    Raises:
        UserError: there is no such table, or it is not one.
    """
    path = run / TABLE if run.is_dir() else run
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "not a table of numbers"
        raise UserError(f"'{path}' cannot be read ({reason}): pass the folders of runs, such as runs/*") from None
    if not rows or "val/nats_per_char" not in rows[0]:
        raise UserError(f"'{path}' holds no validation: pass the folders of runs that have had one")
    return rows


def main(args: Sequence[str]) -> None:
    """Runs `lmlight curves`.

    Raises:
        UserError: see `read`; the picture cannot be written.
    """
    parser = argparse.ArgumentParser(
        "lmlight curves", description="Draws the validation losses of runs in one picture."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, such as runs/*")
    parser.add_argument("--x", choices=("step", "characters", "seconds"), default="step", help="the horizontal axis")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="the picture: .png, .svg or .pdf")
    options = parser.parse_args(args)
    runs = {run.name: read(run) for run in options.runs}
    from lmlight import pictures

    try:
        pictures.learning_curves(runs, options.x).savefig(options.output)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"'{options.output}' cannot be written ({reason}): pass another --output") from None
    for name, rows in runs.items():
        best = min(row["val/nats_per_char"] or float("inf") for row in rows)
        print(f"{name}: best {best:.4f} nats per character, {len(rows)} validations")
    print(f"Picture: {options.output}")
