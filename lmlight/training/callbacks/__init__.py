"""Callbacks that log, plot and print. In `config.yaml`, `trainer.callbacks` lists a run's callbacks and their arguments."""

from lmlight.training.callbacks.run import LearningCurve, RunLogger, RunProgress
from lmlight.training.callbacks.scalars import Throughput, TrainSubsetEval, UpdateRatio
from lmlight.training.callbacks.tensorboard import HParamsLogger, Pictures, SampleText

DEFAULT = (Throughput, UpdateRatio, TrainSubsetEval, SampleText, Pictures, HParamsLogger, LearningCurve)
"""The default callbacks of `lmlight fit`, in this order."""

__all__ = [
    "DEFAULT",
    "HParamsLogger",
    "LearningCurve",
    "Pictures",
    "RunLogger",
    "RunProgress",
    "SampleText",
    "Throughput",
    "TrainSubsetEval",
    "UpdateRatio",
]
