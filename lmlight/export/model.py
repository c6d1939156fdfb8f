"""What there is to take elsewhere: the net, its tokenizer, and what the run said of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from lmlight import checkpoint as checkpoints
from lmlight.data.tokenizer import Tokenizer
from lmlight.errors import UserError
from lmlight.models import Net


@dataclass(frozen=True)
class Model:
    """A checkpoint, opened.

    Attributes:
        net: in evaluation mode, on the CPU.
        tokenizer: its own.
        sampling: the arguments of its `Sampling`.
        settings: of the run: `data`, `model`; plain values.
        figures: validation metrics of these weights, by the names under which they are logged; empty without a validation.
        step: optimizer steps.
    """

    net: Net
    tokenizer: Tokenizer
    sampling: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, float]
    step: int

    @classmethod
    def read(cls, path: Path) -> Model:
        """The model in a checkpoint file.

        Raises:
            UserError: as `checkpoint.read` does.
        """
        content = checkpoints.read(path)
        net, tokenizer = checkpoints.net_of(content).eval(), checkpoints.tokenizer_of(content)
        described = content[checkpoints.METADATA_KEY]
        figures, step = described.get("metrics", {}), content.get("global_step", 0)
        return cls(net, tokenizer, described["sampling"], described["settings"], figures, step)

    def content(self) -> dict[str, Any]:
        """A checkpoint of it, for `checkpoint.write`."""
        return {
            "epoch": 0,
            "global_step": self.step,
            "pytorch-lightning_version": version("lightning"),  # which Lightning asks for; free of it all the same
            "state_dict": {f"{checkpoints.NET_PREFIX}{name}": value for name, value in self.net.state_dict().items()},
            checkpoints.METADATA_KEY: checkpoints.model_metadata(
                self.net, self.tokenizer, self.sampling, self.settings
            ),
        }

    @property
    def start(self) -> int | None:
        """The id that an empty text is taken to follow, as `generation.TextStream` does: a document's end, or a line's."""
        ids = self.tokenizer.bos_ids
        return ids[0] if len(ids) == 1 else None

    @property
    def end(self) -> int | None:
        """The id that ends a document; None if the tokenizer knows of no documents."""
        return self.tokenizer.eos_id


def need(extra: str, *modules: str) -> list[ModuleType]:
    """Imports what a format needs, now that it is asked for.

    Raises:
        UserError: one of them is not installed; the message names the extra.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ModuleNotFoundError as error:
        raise UserError(
            f"this needs the package {error.name}, which is not installed: pip install 'lmlight[{extra}]'"
        ) from None
