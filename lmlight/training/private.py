"""Private attributes of Lightning and torch in `lmlight.training`; `tests/test_private.py` fails if one goes or is added."""

from lightning.pytorch import Trainer

PRIVATE = {
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._should_check_val_fx": (
        "whether a validation follows this batch: a checkpoint written just before one would make the resumed run skip it"
    ),
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger._get_next_version": "names the folder of a run after the time",
    "torch.utils.tensorboard.writer.SummaryWriter._get_file_writer": (
        "writes the table of hyperparameters without a first value for each metric"
    ),
    "torch.optim.adamw.AdamW._step_supports_amp_scaling": (
        "whether a fused optimizer unscales float16 gradients itself, which rules out clipping"
    ),
}


def validation_is_due(trainer: Trainer) -> bool:
    """In `on_train_batch_end`: whether a validation comes next."""
    # the argument only matters for training steps that take an iterator of batches
    return trainer.enable_validation and trainer.fit_loop.epoch_loop._should_check_val_fx(None)  # type: ignore[arg-type]
