"""What is watched while a model is trained, as configs: evaluations, samples, Weights & Biases."""

import re
from dataclasses import dataclass
from typing import Literal

from jaxlab.data import DataConfig, TextConfig
from jaxlab.errors import ConfigError
from jaxlab.evaluation import QuestionsConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """Something that is measured every so many steps, as the task `evaluate` does it."""

    name: str
    """What it is called in metrics and results."""
    data: DataConfig | QuestionsConfig = TextConfig()
    """What it is measured on: held-out text, needles, questions."""
    every: int | None = None
    """Steps between measurements; null: as eval_every. One more comes at the end."""
    split: Literal["validation", "test"] = "validation"
    """Which held-out split."""
    batch_size: int | None = None
    """Sequences in a batch; null: as in training."""
    batches: int = 8
    """At most so many batches; of questions all."""
    position_buckets: int = 16
    """Into how many equal ranges of positions the loss is split."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ConfigError(f"letters, digits and _.- make a name, not {self.name!r}", key="name")
        for name in ("every", "batch_size", "batches", "position_buckets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, is {value}", key=name)


@dataclass(frozen=True)
class SamplesConfig:
    """Texts that the model writes while it is trained."""

    prompts: tuple[str, ...] = ()
    """What they begin with."""
    every: int | None = None
    """Steps between them; null: as eval_every. One more comes at the end."""
    max_new_tokens: int = 64
    """Tokens of each."""
    temperature: float = 0.0
    """0 takes the most likely token."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("give at least one", key="prompts")
        for name in ("every", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, is {value}", key=name)
        if self.temperature < 0:
            raise ConfigError(f"must not be negative, is {self.temperature}", key="temperature")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    project: str = "jaxlab"
    """The project that the run belongs to."""
    entity: str | None = None
    """A user or a team; null: the account's own."""
    group: str | None = None
    """Runs that belong together."""
    tags: tuple[str, ...] = ()
    """Words to find it by."""
    mode: Literal["online", "offline"] = "online"
    """offline: everything stays in the run folder, until `wandb sync`."""

    def __post_init__(self) -> None:
        if not self.project:
            raise ConfigError("must not be empty", key="project")
