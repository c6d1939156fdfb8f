"""Low-rank adapters (LoRA) through the `peft` library: finetuning that trains and stores only small added matrices."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer

from lmlight import checkpoint as checkpoints
from lmlight.errors import UserError, missing_extra
from lmlight.training.module import STATES, LanguageModel


class LoRAModel(LanguageModel):
    """Finetunes a model through low-rank adapters; its own weights are frozen.

    Each chosen matrix W is replaced by W + alpha / rank · B A, where only A (rank, in) and B (out, rank) are trained
    (Hu et al. 2021, https://arxiv.org/abs/2106.09685). Checkpoints hold the adapters and the path of their base
    model; loading one merges the adapters into that model, so that all commands can use it. Needs the package `peft`.

    Args:
        rank: Rank of A and B.
        alpha: Scale of the adapters, relative to the rank.
        adapter_dropout: Dropout probability of the adapters' input.
        targets: Names of the linear layers that get adapters. The default is all those in `Transformer`'s blocks.
        kwargs: Arguments of `LanguageModel`; `init_from`, on the command line `--init_from`, is required.

    Raises:
        UserError: `peft` is not installed, or an argument is out of range; in `fit`, also if `init_from` is missing.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        adapter_dropout: float = 0.0,
        targets: Sequence[str] = ("qkv", "output", "up", "down"),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if importlib.util.find_spec("peft") is None:
            raise missing_extra("LoRAModel needs the peft package", "lora")
        if rank < 1 or alpha <= 0 or not 0 <= adapter_dropout < 1:
            raise UserError(
                f"expected model.rank of at least 1, model.alpha above 0 and model.adapter_dropout in [0, 1), got {rank}, "
                f"{alpha:g} and {adapter_dropout:g}"
            )
        self.rank, self.alpha, self.adapter_dropout, self.targets = rank, alpha, adapter_dropout, targets
        init_from = kwargs.get("init_from")
        self._base: str | None = None if init_from is None else init_from.get("path")
        # taken when the file is read, because it could be replaced during the run
        self._fingerprint = checkpoints.fingerprint(self._base) if self._base else ""

    def check(self, block_size: int | None, trainer: Trainer | None = None) -> None:
        super().check(block_size, trainer)
        if trainer is not None and self._base is None:
            raise UserError("LoRAModel finetunes a model: pass its checkpoint as --init_from")

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Build the network with its adapters, as `configure_model` did in the process that trained it."""
        if self.net is None and state:
            self.configure_model()

    def configure_model(self) -> None:
        is_new = self.net is None
        if self.device_mesh is not None:
            raise UserError("adapters cannot be sharded: leave out the strategy (fsdp.yaml)")
        super().configure_model()
        if not is_new:
            return
        from peft import LoraConfig, inject_adapter_in_model

        modules = dict(self._net().named_modules())
        weights = [id(weight) for _, weight in self._net().named_parameters(remove_duplicate=False)]
        for target in self.targets:
            found = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
            if not found:
                raise UserError(f"model.targets: the network has no module '{target}'")
            if not all(isinstance(one, torch.nn.Linear) and weights.count(id(one.weight)) == 1 for one in found):
                raise UserError(f"model.targets: '{target}' is not a linear layer with a weight of its own")
        options = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=self.adapter_dropout,
            target_modules=list(self.targets),
        )
        inject_adapter_in_model(options, self._net())  # freezes all other weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert self._base is not None
        for name in checkpoint.keys() & STATES:
            state = checkpoint[name]
            checkpoint[name] = {weight: value for weight, value in state.items() if checkpoints.ADAPTER in weight}
        adapter = {"base": self._base, "fingerprint": self._fingerprint, "scale": self.alpha / self.rank}
        checkpoint[checkpoints.METADATA_KEY]["adapter"] = adapter

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the weights of the base model, which a resumed run needs."""
        super().on_load_checkpoint(checkpoint)
        if "adapter" not in checkpoint[checkpoints.METADATA_KEY]:
            raise UserError("the checkpoint has no adapters that LoRAModel could resume: pass it as --init_from")
        adapters = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if adapters != {name: value.shape for name, value in self.state_dict().items() if checkpoints.ADAPTER in name}:
            raise UserError(
                "a resumed run cannot change model.rank or model.targets: leave them out or start a new run"
            )
        base = checkpoints.read_base(checkpoint)
        self._base, self._fingerprint = base["path"], checkpoint[checkpoints.METADATA_KEY]["adapter"]["fingerprint"]
        for name in self.state_dict():
            if name not in adapters and (original := name.replace(".base_layer.", ".")) in base["state_dict"]:
                for state in checkpoint.keys() & STATES:
                    checkpoint[state][name] = base["state_dict"][original]
