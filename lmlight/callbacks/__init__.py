"""What watches a run and shows it. Each can be left out, or set, in the list `trainer.callbacks`."""

from lmlight.callbacks.curve import LearningCurve, SettingsTable
from lmlight.callbacks.looks import Pictures, TokenEmbedding
from lmlight.callbacks.run import RunLogger, RunProgress
from lmlight.callbacks.scalars import SmoothLoss, Throughput, TrainingSample, UpdateRatio
from lmlight.callbacks.text import SampleText, WritePredictions

DEFAULT = (
    SmoothLoss,
    Throughput,
    UpdateRatio,
    TrainingSample,
    SampleText,
    Pictures,
    TokenEmbedding,
    SettingsTable,
    LearningCurve,
)
"""What `lmlight fit` watches with, in this order."""

__all__ = [
    "DEFAULT",
    "LearningCurve",
    "Pictures",
    "RunLogger",
    "RunProgress",
    "SampleText",
    "SettingsTable",
    "SmoothLoss",
    "Throughput",
    "TokenEmbedding",
    "TrainingSample",
    "UpdateRatio",
    "WritePredictions",
]
