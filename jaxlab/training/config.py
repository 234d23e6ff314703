"""What a training run is: model, data, optimizer, mesh, and how long."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from jaxlab.data import DataConfig, TextConfig
from jaxlab.distributed import DistributedConfig, OneProcessConfig
from jaxlab.errors import ConfigError, UserError
from jaxlab.losses import LossConfig
from jaxlab.models import MeshConfig, ModelConfig
from jaxlab.retrofit import GATE
from jaxlab.training.checkpoints import KeepConfig
from jaxlab.training.estimate import EstimateConfig
from jaxlab.training.lora import LoraConfig
from jaxlab.training.monitoring import EvaluationConfig, SamplesConfig, WandbConfig
from jaxlab.training.optimizer import OptimizerConfig
from jaxlab.training.spikes import SpikesConfig

MOST = (1 << 31) - 1
"""The largest int32: of steps, and of the tokens in a batch."""

_SIZES = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "family")
"""What a model cannot be described without."""


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
        "samples",
        "tensorboard",
        "wandb",
        "profile",
        "estimate",
    )
    """What does not make another run of it: it may change where a run is taken up again."""

    model: ModelConfig = ModelConfig()
    """The model. Where it names no sizes it is that of init_from, with what it does name changed:
    compute_dtype, remat, attention."""
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
    continue_from: str | None = None
    """Go on from the newest checkpoint of another run, by its folder: with its parameters, optimizer and
    steps, and with other data, schedule, steps or compute dtype."""
    lora: LoraConfig | None = None
    """Train low-rank adapters beside the model's matrices; none: the parameters themselves."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters that are not trained: those beside adapters, and those whose learning rate is 0."""
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
    evaluations: tuple[EvaluationConfig, ...] = ()
    """What else is measured while training, and at the end."""
    samples: SamplesConfig | None = None
    """Texts that the model writes while it is trained, in samples.jsonl."""
    tensorboard: bool = False
    """Write the metrics as event files of TensorBoard too (extra: tensorboard)."""
    wandb: WandbConfig | None = None
    """Send the metrics to Weights & Biases too (extra: wandb)."""
    profile: tuple[int, ...] = ()
    """The first and the last step of which a trace is made."""
    export: Literal["hf"] | None = None
    """At the end write the model as a folder of Hugging Face too, `hf`."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "log_every", "eval_every", "eval_batches")
        for name in (*counts, "checkpoint_every"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ConfigError(f"must be from 1 to {MOST}, is {getattr(self, name)}", key=name)
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ConfigError(f"two steps, the first and the last, not {list(self.profile)}", key="profile")
        if self.profile and self.profile[0] > self.steps:
            raise ConfigError(f"begins after the last step, which is {self.steps}", key="profile")
        names = [evaluation.name for evaluation in self.evaluations]
        if twice := {name for name in names if names.count(name) > 1} | {"validation", "test"} & set(names):
            raise ConfigError(f"the name {min(twice)} is taken; give another", key="evaluations")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}",
                key="accumulation",
            )
        if self.continue_from is not None and self.init_from is not None:
            raise ConfigError("the checkpoint holds all parameters; leave init_from out", key="continue_from")
        if self.model.sparsity is not None:
            raise ConfigError("is for inference; give it to evaluate", key="model.sparsity")
        if not 0 < self.retrofit_gate < 0.5:
            raise ConfigError(f"must lie between 0 and 0.5, is {self.retrofit_gate}", key="retrofit_gate")
        if not 0 <= self.seed <= MOST:
            raise ConfigError(f"must be from 0 to {MOST}, is {self.seed}", key="seed")
        if self.lora is not None and self.init_from is None:
            raise ConfigError("adapters stand beside a trained model; give init_from", key="lora")
        if self.lora is not None and self.export is not None and not self.lora.merge:
            raise ConfigError("writes the whole model; set lora.merge: true", key="export")
        if self.data.kind == "image_chats" and self.accumulation > 1:
            raise ConfigError("image_chats are read whole; lower batch_size", key="accumulation")
        if not self.model_is_initial:
            self._check_model()

    @property
    def model_is_initial(self) -> bool:
        """Whether the model is that of init_from: none of its sizes is given."""
        usual = ModelConfig()
        return self.init_from is not None and all(
            getattr(self.model, name) == getattr(usual, name) for name in _SIZES
        )

    def _check_model(self) -> None:
        """Whether model, data and optimizer fit."""
        if self.data.kind == "digits" and self.data.has_images and not self.model.has_vision:
            raise ConfigError("digits with images need a model with vision; give model.vision", key="model")
        if self.optimizer.language_scale != 1 and not self.model.has_vision:
            raise ConfigError(
                "is for a model with vision; set optimizer.learning_rate", key="optimizer.language_scale"
            )
        if self.data.kind == "text" and self.data.sequence_length > self.model.max_length:
            raise ConfigError(
                f"{self.model.max_length} does not hold sequences of {self.data.sequence_length}",
                key="model.max_length",
            )


def with_initial_model(config: TrainConfig, theirs: ModelConfig) -> TrainConfig:
    """The config with the model that it is for, which is that of init_from where it names none of its own.

    Args:
      theirs: the model of init_from.

    Raises:
      UserError: the data does not fit it.
    """
    if not config.model_is_initial:
        return config
    usual = ModelConfig()
    named = {
        field.name: getattr(config.model, field.name)
        for field in fields(ModelConfig)
        if getattr(config.model, field.name) != getattr(usual, field.name)
    }
    try:
        return replace(config, model=replace(theirs, **named))
    except ConfigError as error:
        raise UserError(f"the model of init_from ({config.init_from}): {error}") from error
