"""What a training run does around its steps, each thing a callback."""

from jaxlab.training.callbacks.evaluations import Evaluate
from jaxlab.training.callbacks.guard import GuardSpikes
from jaxlab.training.callbacks.held_out import EvaluateHeldOut
from jaxlab.training.callbacks.metrics import LogMetrics, ShowProgress
from jaxlab.training.callbacks.profile import TraceSteps
from jaxlab.training.callbacks.samples import WriteSamples
from jaxlab.training.callbacks.saving import SaveCheckpoints, SaveModel
from jaxlab.training.callbacks.trackers import WriteTensorBoard, WriteWandb, check_trackers

__all__ = [
    "Evaluate",
    "EvaluateHeldOut",
    "GuardSpikes",
    "LogMetrics",
    "SaveCheckpoints",
    "SaveModel",
    "ShowProgress",
    "TraceSteps",
    "WriteSamples",
    "WriteTensorBoard",
    "WriteWandb",
    "check_trackers",
]
