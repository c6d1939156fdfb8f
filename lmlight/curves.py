"""A run's validations as a table, `metrics.csv`.

The table has a row for each validation, with the step, the characters of training text seen, the seconds, and every figure.
"""

from __future__ import annotations

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
    except (OSError, ValueError, TypeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a table of numbers"
        raise UserError(f"'{path}' cannot be read ({reason}): pass the folders of runs, such as runs/*") from None
    if all(row.get("val/nats_per_char") is None for row in rows):
        raise UserError(f"'{path}' holds no validation: pass the folders of runs that have had one")
    return rows
