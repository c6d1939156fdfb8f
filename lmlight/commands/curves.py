"""`lmlight curves RUN...`: plots the learning curves of several runs in one figure."""

import csv
import math
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from lmlight.command_line import Parser, counted
from lmlight.errors import UserError, reason, say


def main(args: Sequence[str]) -> None:
    """Runs `lmlight curves`. Entries that cannot be plotted are skipped, each with a line on stderr."""
    parser = Parser("lmlight curves", description="Plots the validation losses of runs in one figure.")
    parser.add_argument("runs", nargs="+", help="folders of runs, such as runs/*; other files and folders are skipped")
    parser.add_argument("--x", choices=("step", "characters", "seconds"), default="step", help="the horizontal axis")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="the figure: .png, .svg or .pdf")
    options = parser.parse_args(args)
    if options.output.name in ("", ".."):
        raise UserError(f"--output must be a file, such as curves.png, got '{options.output}'")
    output = options.output if options.output.suffix else options.output.with_suffix(".png")
    runs = {}
    # the Windows shell does not expand patterns, and Path.glob takes no absolute ones
    for name in (found for pattern in options.runs for found in sorted(glob(pattern)) or [pattern]):  # noqa: PTH207
        if rows := read(Path(name), options.x):
            runs[name] = rows
        else:
            say(UserError(f"'{name}' has no metrics.csv with a finite loss and {options.x}"), "skipped")
    if not runs:
        raise UserError("none of these can be plotted: pass the folders of runs, such as runs/*")
    from lmlight import pictures  # Matplotlib takes a third of a second to import

    try:
        pictures.learning_curves(runs, options.x).savefig(output)
    except (OSError, ValueError) as error:
        raise UserError(f"'{output}' cannot be written ({reason(error)}): pass another --output") from None
    for name, rows in runs.items():
        losses = [row["val/nats_per_char"] for row in rows]
        print(
            f"{name}: last {losses[-1]:.4f}, best {min(losses):.4f} nats per character; {counted(len(rows), 'validation')}"
        )
    counts = {row.get("val/characters", math.nan) for rows in runs.values() for row in rows}
    if len(set(filter(math.isfinite, counts))) > 1:
        say(UserError("these runs are scored on different texts, so their losses are not comparable"), "warning")
    print(f"Figure: {output}")


def read(run: Path, x: str) -> list[dict[str, float]]:
    """The validations in a run's `metrics.csv` whose loss and column `x` are finite; empty if there is no such file."""
    path = run / "metrics.csv" if run.is_dir() else run
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []
    return [row for row in rows if all(math.isfinite(row.get(name, math.nan)) for name in (x, "val/nats_per_char"))]
