"""What a training run is: model, data, optimizer, mesh, and how long."""

from dataclasses import dataclass
from typing import ClassVar

from jaxlab.data import DataConfig, TextConfig
from jaxlab.distributed import DistributedConfig, OneProcessConfig
from jaxlab.errors import ConfigError
from jaxlab.losses import LossConfig
from jaxlab.models import MeshConfig, ModelConfig
from jaxlab.retrofit import GATE
from jaxlab.training.checkpoints import KeepConfig
from jaxlab.training.estimate import EstimateConfig
from jaxlab.training.optimizer import OptimizerConfig
from jaxlab.training.spikes import SpikesConfig

MOST = (1 << 31) - 1
"""The largest int32: of steps, and of the tokens in a batch."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model, from random parameters or from another model's."""

    HOW_IT_RUNS: ClassVar = (
        "mesh",
        "distributed",
        "log_every",
        "checkpoint_every",
        "checkpoint_in_background",
        "keep",
        "estimate",
    )
    """What does not make another run of it: it may change where a run is taken up again."""

    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = TextConfig()
    """What it reads."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it learns."""
    loss: LossConfig = LossConfig()
    """What is added to the cross-entropy."""
    spikes: SpikesConfig = SpikesConfig()
    """What happens to updates that are far off."""
    mesh: MeshConfig = MeshConfig()
    """How devices are arranged."""
    distributed: DistributedConfig = OneProcessConfig()
    """Whether several processes compute the run, on one host or many."""
    estimate: EstimateConfig = EstimateConfig()
    """What `--check` takes for the speed of the devices."""
    init_from: str | None = None
    """Start from this model: a model folder, a run folder, or the config of a finished train run. A vision
    tower and a projector that it lacks start from random parameters. A dense model for a model with NSA that
    is otherwise the same is retrofitted."""
    retrofit_gate: float = GATE
    """Gates of compression and window at the start of a retrofit; selection has what they leave of 1."""
    steps: int = 1000
    """Updates."""
    batch_size: int = 32
    """Sequences in an update, over all devices."""
    accumulation: int = 1
    """Parts in which the batch is read, one after the other, to save memory."""
    seed: int = 0
    """Of initial parameters and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between evaluations on the validation split; one more comes at the end."""
    eval_batches: int = 8
    """Batches in an evaluation."""
    checkpoint_every: int = 500
    """Steps between checkpoints, from which a killed run goes on."""
    checkpoint_in_background: bool = True
    """Go on training while a copy of the state is written, which takes the state's size of the host's
    memory."""
    keep: KeepConfig = KeepConfig()
    """Which checkpoints stay."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "log_every", "eval_every", "eval_batches")
        for name in (*counts, "checkpoint_every"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ConfigError(f"must be from 1 to {MOST}, is {getattr(self, name)}", key=name)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}",
                key="accumulation",
            )
        if self.data.kind == "digits" and self.data.has_images and not self.model.has_vision:
            raise ConfigError("digits with images need a model with vision; give model.vision", key="model")
        if not 0 < self.retrofit_gate < 0.5:
            raise ConfigError(f"must lie between 0 and 0.5, is {self.retrofit_gate}", key="retrofit_gate")
        if self.model.sparsity is not None:
            raise ConfigError("is for inference; give it to evaluate", key="model.sparsity")
        if not 0 <= self.seed <= MOST:
            raise ConfigError(f"must be from 0 to {MOST}, is {self.seed}", key="seed")
        if self.optimizer.language_scale != 1 and not self.model.has_vision:
            raise ConfigError(
                "is for a model with vision; set optimizer.learning_rate", key="optimizer.language_scale"
            )
        if self.data.kind == "text" and self.data.sequence_length > self.model.max_length:
            raise ConfigError(
                f"{self.model.max_length} does not hold sequences of {self.data.sequence_length}",
                key="model.max_length",
            )
