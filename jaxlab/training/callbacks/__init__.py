"""What a training run does around its steps, each thing a callback."""

from jaxlab.training.callbacks.guard import GuardSpikes
from jaxlab.training.callbacks.held_out import EvaluateHeldOut
from jaxlab.training.callbacks.metrics import LogMetrics, ShowProgress
from jaxlab.training.callbacks.saving import SaveCheckpoints, SaveModel

__all__ = [
    "EvaluateHeldOut",
    "GuardSpikes",
    "LogMetrics",
    "SaveCheckpoints",
    "SaveModel",
    "ShowProgress",
]
