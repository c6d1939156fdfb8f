"""Knowledge distillation: train a model on the predictions of earlier ones."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lmlight import checkpoint as checkpoints
from lmlight.data.loader import IGNORE_INDEX, Batch
from lmlight.data.tokenizer import Tokenizer
from lmlight.errors import UserError
from lmlight.models import Net
from lmlight.training.module import LanguageModel
from lmlight.training.run_settings import scores_text_read_by


class DistilledModel(LanguageModel):
    """Trains a network on the text and on the predictions of trained models, its teachers.

    With little text and enough time, this overfits less than training on the text alone: the average of several models
    predicts better than each of them, and its probabilities say more about a context than the one token that follows in the
    text. Hinton et al. 2015 (https://arxiv.org/abs/1503.02531); for small texts, Kim et al. 2025
    (https://arxiv.org/abs/2509.14786).

    Args:
        teachers: Checkpoints of the teachers, or folders of their runs. They must have been trained with the same tokenizer
            and at least the same block size, and not on text that this run scores; their networks may differ.
        teacher_net: Class of the teachers' networks, if it is your own.
        teacher_weight: Weight of the teachers' mean probabilities in the target; the rest is on the token in the text.
        kwargs: Arguments of `LanguageModel`.

    Raises:
        UserError: `teacher_weight` is outside [0, 1].
    """

    def __init__(
        self,
        teachers: Sequence[str] | str = (),
        teacher_net: type[Net] | None = None,
        teacher_weight: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= teacher_weight <= 1:
            raise UserError(f"model.teacher_weight must lie in [0, 1], got {teacher_weight}")
        self.teacher_net, self.teacher_weight = teacher_net, teacher_weight
        self._paths = [teachers] if isinstance(teachers, str) else list(teachers)
        self._teachers: list[tuple[Net, Tokenizer | None]] = []  # in a list, so they are not part of this module
        self._fingerprints: list[str] = []

    def check(self, block_size: int | None, trainer: Trainer | None = None) -> None:
        """Also load the teachers, if `trainer` is not None; raises a `UserError` if there are none, or one is unsuitable."""
        super().check(block_size, trainer)
        if trainer is None or self._teachers:
            return
        if not self._paths:
            raise UserError("DistilledModel needs trained models: pass --model.teachers '[runs/..., runs/...]'")
        for number, name in enumerate(self._paths):
            try:
                path = checkpoints.find(name, trainer.default_root_dir, "best").absolute()
                content = checkpoints.read(path)
                net = checkpoints.net_of(content, self.teacher_net).eval().requires_grad_(False)
                if block_size is not None and block_size > net.block_size:
                    raise UserError(
                        f"'{name}' takes at most {net.block_size} tokens, got data.block_size {block_size}: lower it"
                    )
                before = content[checkpoints.METADATA_KEY]["settings"].get("data", {})
                # comparing tokenizers would not show it: a character or pretrained one may not depend on the split
                if scores_text_read_by(before, self.settings.get("data") or {}):
                    raise UserError(
                        f"'{name}' was trained on text that this run scores: train both with the same data.val_fraction, "
                        "data.val_corpus and data.validate_on"
                    )
                self._teachers.append((net, checkpoints.tokenizer_of(content)))
            except UserError as error:
                hint = str(error).replace("model.net", "model.teacher_net").replace(" net=", " teacher_net=")
                raise UserError(f"--model.teachers: {hint}") from None
            self._paths[number] = str(path)
            self._fingerprints.append(checkpoints.fingerprint(path))
        # `best` or the folder's best checkpoint may be another file when the run is resumed
        if "model" in self.settings:
            self.settings["model"]["teachers"] = self._paths

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for path, (net, tokenizer) in zip(self._paths, self._teachers if stage == "fit" else []):
            if self.tokenizer is None or tokenizer is None:
                is_same = self.vocab_size == net.vocab_size  # there is nothing else to compare
            else:
                is_same = self.tokenizer.fingerprint == tokenizer.fingerprint
            if not is_same:
                raise UserError(
                    f"--model.teachers: '{path}' has a different tokenizer from this run: train both with the same "
                    "data.corpus, data.tokenizer and data.val_fraction"
                )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for net, _ in self._teachers:
            net.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[checkpoints.METADATA_KEY]["teachers"] = self._fingerprints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        before = checkpoint[checkpoints.METADATA_KEY].get("teachers")
        if self.trainer.state.fn == TrainerFn.FITTING and before != self._fingerprints:
            raise UserError(
                f"--model.teachers: {', '.join(self._paths)} are not the checkpoints that the run began with: put those "
                "back, or start a new run"
            )

    def training_loss(self, batch: Batch) -> Tensor:
        """The cross-entropy with the mixed target.

        It cannot fall below the target's entropy, so do not compare models by this loss.
        """
        idx, targets = batch.inputs, batch.targets.flatten()
        with torch.no_grad():
            target = sum(net(idx).flatten(0, 1).float().softmax(-1) for net, _ in self._teachers)
            assert isinstance(target, Tensor)
            target *= self.teacher_weight / len(self._teachers)  # (B T, V)
            is_scored = targets != IGNORE_INDEX
            from_text = target.new_full((len(targets), 1), 1 - self.teacher_weight)
            target.scatter_add_(1, targets.clamp(min=0)[:, None], from_text)
        losses = F.cross_entropy(self._net()(idx).flatten(0, 1).float(), target, reduction="none")
        return (losses * is_scored).sum() / is_scored.sum()
