"""The precision of float32 matrix products during training."""

from contextlib import suppress

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class MatmulPrecision(Callback):
    """Sets the precision for `fit` and restores it afterwards; see `torch.set_float32_matmul_precision`."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self._before: str | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with suppress(RuntimeError):  # the user has set torch's newer switches, one per backend
            self._before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.precision)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before is not None:
            torch.set_float32_matmul_precision(self._before)
            self._before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)
