"""Knowledge distillation: train a model on the predictions of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from lmlight import checkpoint as checkpoints
from lmlight.data.loader import IGNORE_INDEX, Batch
from lmlight.errors import UserError
from lmlight.models import Net
from lmlight.training.module import LanguageModel
from lmlight.training.run_settings import RUNS


class DistilledModel(LanguageModel):
    """Trains a network on the text and on the predictions of trained models, its teachers.

    With little text and enough time, this overfits less than training on the text alone: the average of several models
    predicts better than each of them, and its probabilities say more about a context than the one token that follows in the
    text. Hinton et al. 2015 (https://arxiv.org/abs/1503.02531); for small texts, Kim et al. 2025
    (https://arxiv.org/abs/2509.14786).

    Args:
        teachers: Checkpoints of the teachers, or folders of their runs. They must have been trained with the same tokenizer
            and at least the block size; their networks may differ.
        teacher_weight: Share of the teachers' mean probabilities in the target; the rest is the token in the text.
        kwargs: Arguments of `LanguageModel`.

    Raises:
        UserError: `teacher_weight` is outside [0, 1].
    """

    def __init__(self, teachers: Sequence[str] = (), teacher_weight: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= teacher_weight <= 1:
            raise UserError(f"model.teacher_weight must lie in [0, 1], got {teacher_weight}")
        self.teacher_weight, self._paths = teacher_weight, teachers
        self._teachers: list[LanguageModel] = []  # in a list, so that they are no part of this module

    def check(self, block_size: int | None, trainer: Trainer | None = None) -> None:
        """Also load the teachers, if `trainer` is not None.

        Raises:
            UserError: There are no teachers, or one of them cannot be loaded or is too short.
        """
        super().check(block_size, trainer)
        if trainer is None:
            return
        if not self._paths:
            raise UserError("DistilledModel needs trained models: pass --model.teachers '[runs/..., runs/...]'")
        self._teachers = [
            LanguageModel.load_from_checkpoint(checkpoints.find(path, RUNS, "best")) for path in self._paths
        ]
        for path, teacher in zip(self._paths, self._teachers):
            if block_size is not None and block_size > (longest := _net_of(teacher).block_size):
                raise UserError(
                    f"teacher '{path}' takes {longest} tokens, fewer than data.block_size {block_size}: lower it"
                )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for path, teacher in zip(self._paths, self._teachers if stage == "fit" else []):
            if self.tokenizer is None or teacher.tokenizer is None:
                is_same = self.vocab_size == teacher.vocab_size  # there is no more to compare
            else:
                is_same = self.tokenizer.fingerprint == teacher.tokenizer.fingerprint
            if not is_same:
                raise UserError(
                    f"teacher '{path}' has another tokenizer than this run: train both with the same data.corpus, "
                    "data.tokenizer and data.val_fraction"
                )

    def on_fit_start(self) -> None:
        for teacher in self._teachers:
            teacher.to(self.device).requires_grad_(False)

    def training_loss(self, batch: Batch) -> Tensor:
        """The cross-entropy of the mixed target: at least its entropy, so it does not compare with that of other models."""
        idx, targets = batch.inputs, batch.targets.flatten()
        with torch.no_grad():
            target = sum(_net_of(teacher)(idx).flatten(0, 1).float().softmax(-1) for teacher in self._teachers)
            assert isinstance(target, Tensor)
            target *= self.teacher_weight / len(self._teachers)  # (B T, V)
            is_scored = targets != IGNORE_INDEX
            from_text = target.new_full((len(targets), 1), 1 - self.teacher_weight)
            target.scatter_add_(1, targets.clamp(min=0)[:, None], from_text)
        losses = F.cross_entropy(self._net()(idx).flatten(0, 1).float(), target, reduction="none")
        return (losses * is_scored).sum() / is_scored.sum()


def _net_of(teacher: LanguageModel) -> Net:
    assert teacher.net is not None
    return teacher.net
