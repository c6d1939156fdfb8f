"""The private attributes of Lightning that lmlight uses; `tests/test_private.py` fails when one disappears or is added."""

from lightning.pytorch import Trainer

PRIVATE = {
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._should_check_val_fx": (
        "whether a validation follows this batch: a checkpoint written just before one would make the resumed run skip it"
    ),
}


def validation_is_due(trainer: Trainer) -> bool:
    """In `on_train_batch_end`: whether a validation comes next."""
    # the argument only matters for training steps that take an iterator of batches
    return trainer.enable_validation and trainer.fit_loop.epoch_loop._should_check_val_fx(None)  # type: ignore[arg-type]
