"""A config class that uses everything that configs can hold."""

import dataclasses
from typing import Literal

from jaxlab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Attention:
    kind: Literal["full", "sliding", "nsa"] = "full"
    """Which keys a query reads."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 2
    """Key and value heads."""

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} heads cannot be shared by {self.num_kv_heads} key/value heads",
                key="num_heads",
            )


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 64
    """Width of the residual stream."""
    attention: Attention = Attention()
    """Attention."""
    dropout: float = 0.0
    """Share of activations dropped."""


@dataclasses.dataclass(frozen=True)
class Constant:
    kind: Literal["constant"] = "constant"


@dataclasses.dataclass(frozen=True)
class Decay:
    final: float = 0.0
    """Share of the peak at the end."""


@dataclasses.dataclass(frozen=True)
class Linear(Decay):
    kind: Literal["linear"] = "linear"
    shape: Literal["straight", "steps"] = "straight"
    """How it falls."""


@dataclasses.dataclass(frozen=True)
class Cosine(Decay):
    kind: Literal["cosine"] = "cosine"
    cycles: int = 1
    """How often it comes back."""
    shape: Literal["half", "full"] = "half"
    """How far a cycle goes."""

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ConfigError(f"must be at least 1, is {self.cycles}", key="cycles")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    kind: Literal["gaussian"] = "gaussian"
    deviation: float
    """How wide it is."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    kind: Literal["uniform"] = "uniform"
    edges: tuple[float, float] = (0.0, 1.0)
    """From where to where."""


@dataclasses.dataclass(frozen=True)
class Rule:
    pattern: str
    """Names that the rule is for."""
    value: float
    """What it gives them."""


@dataclasses.dataclass(frozen=True)
class Example:
    steps: int
    """Updates."""
    lambda_: float = 0.7
    """Outer factor."""
    lambda_v: float | tuple[float, ...] | tuple[Rule, ...] = 0.9
    """Weight of the receiver: one, one per layer, or by rule."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""
    layers: tuple[int, ...] = ()
    """Layers looked at."""
    names: tuple[str, ...] = ("a",)
    """Words."""
    remat: bool = False
    """Recompute activations."""
    note: str = ""
    """Free text."""
    init_from: str | None = None
    """Where parameters come from."""
    seeds: int | tuple[int, ...] | None = None
    """One seed or several."""
    precision: Literal["bf16", "fp32", 8] = "bf16"
    """Format of numbers."""
    limit: float | str = 1.0
    """A number, or a rule by name."""
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weight by name."""
    rules: tuple[Rule, ...] = ()
    """Rules in order."""
    teacher: Model | None = None
    """A second model."""
    schedule: Constant | Linear | Cosine = Linear(final=0.25)
    """One of several groups."""
    noise: Gaussian | Uniform | None = None
    """One of two groups, or none."""
    model: Model = Model(width=32, attention=Attention(num_kv_heads=4))
    """The model."""
