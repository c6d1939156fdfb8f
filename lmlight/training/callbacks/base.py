"""Trainer helpers that the callbacks share."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def validates_fit(trainer: Trainer) -> bool:
    """In a hook of validation: whether it is one of `fit`'s own, not Lightning's sanity check before the first step."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def run_folder(trainer: Trainer) -> Path | None:
    """Where a run keeps its files; None for a trial (`fast_dev_run`), which leaves none. All ranks must call it together."""
    folder = None if trainer.fast_dev_run else trainer.log_dir  # type: ignore[attr-defined]  # set late
    return Path(folder) if folder else None
