"""An opened checkpoint, and the import of optional packages."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from lmlight import checkpoint as checkpoints
from lmlight.data.tokenizer import Tokenizer
from lmlight.errors import missing_extra
from lmlight.models import Net


@dataclass(frozen=True)
class Model:
    """The network and the tokenizer of a checkpoint, and what the run recorded about them."""

    net: Net  # in evaluation mode, on the CPU
    tokenizer: Tokenizer
    sampling: dict[str, Any]  # arguments of `Sampling`
    settings: dict[str, Any]  # the run's `data` settings, plain values
    metrics: dict[str, float]  # validation metrics of these weights by log tag; empty if they were not validated
    step: int  # optimizer steps

    @classmethod
    def read(cls, path: Path, trusted: type[Net] | None = None) -> Model:
        """Opens a checkpoint file.

        Raises:
            UserError: see `checkpoint.read` and, for `trusted`, `checkpoint.net_class`.
        """
        content = checkpoints.read(path)
        net, tokenizer = checkpoints.text_model_of(content, trusted)
        metadata = content[checkpoints.METADATA_KEY]
        metrics, step = metadata.get("metrics", {}), content.get("global_step", 0)
        return cls(net, tokenizer, metadata["sampling"], metadata["settings"], metrics, step)

    def to_checkpoint(self) -> dict[str, Any]:
        """The content of a checkpoint file, for `checkpoint.write`."""
        return {
            "epoch": 0,
            "global_step": self.step,
            "pytorch-lightning_version": version("lightning"),  # Lightning refuses a checkpoint without it
            "state_dict": {f"{checkpoints.NET_PREFIX}{name}": value for name, value in self.net.state_dict().items()},
            checkpoints.METADATA_KEY: checkpoints.model_metadata(
                self.net, self.tokenizer, self.sampling, self.settings
            ),
        }

    @property
    def bos_id(self) -> int | None:
        """The id to start from when the prompt is empty; None if there is no single one."""
        ids = self.tokenizer.bos_ids
        return ids[0] if len(ids) == 1 else None

    def corpus_name(self, setting: str = "corpus") -> str:
        """The file name of a corpus, without its folder and a URL's query, which are private; empty if there was none."""
        name = str(self.settings.get("data", {}).get(setting) or "")
        return PureWindowsPath(urlsplit(name).path if "://" in name else name).name  # splits at / and \


def require_extra(extra: str, *modules: str) -> list[ModuleType]:
    """Imports optional packages.

    Raises:
        UserError: one of them is not installed; the message names the extra that installs it.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ModuleNotFoundError as error:
        raise missing_extra(f"this command needs the {error.name} package", extra) from None
