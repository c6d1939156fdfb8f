"""What watches a run and shows it. Each can be left out, or set, in the list `trainer.callbacks`."""

from lmlight.training.callbacks.learning_curve import HParamsLogger, LearningCurve
from lmlight.training.callbacks.plots import Pictures, TokenEmbedding
from lmlight.training.callbacks.run import RunLogger, RunProgress
from lmlight.training.callbacks.scalars import SmoothLoss, Throughput, TrainSubsetEval, UpdateRatio
from lmlight.training.callbacks.text import SampleText, WritePredictions

DEFAULT = (
    SmoothLoss,
    Throughput,
    UpdateRatio,
    TrainSubsetEval,
    SampleText,
    Pictures,
    TokenEmbedding,
    HParamsLogger,
    LearningCurve,
)
"""What `lmlight fit` watches with, in this order."""

__all__ = [
    "DEFAULT",
    "HParamsLogger",
    "LearningCurve",
    "Pictures",
    "RunLogger",
    "RunProgress",
    "SampleText",
    "SmoothLoss",
    "Throughput",
    "TokenEmbedding",
    "TrainSubsetEval",
    "UpdateRatio",
    "WritePredictions",
]
