"""What a diagnosis knows of models, and what a finding is."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jaxlab.checkpoints import Tensor, decides_tensors, language_settings_apart
from jaxlab.merging.diagnosis.measures import Measured, Side, Sums, TensorDifference
from jaxlab.merging.diagnosis.tokens import TokenDifferences

Severity = Literal["breaks", "harms", "note"]
SEVERITIES: tuple[Severity, ...] = ("breaks", "harms", "note")

SHOWN = 4
"""Names in a line."""


@dataclass(frozen=True)
class Finding:
    """One thing that speaks against a merge, or that must be known."""

    severity: Severity
    """breaks: the merge is gibberish or not possible; harms: it loses; note: know it."""
    cause: str
    """One word for each kind of finding."""
    said: str
    remedy: str
    weight: int | float = 0
    """How bad among those of its severity; larger comes first."""
    tensors: tuple[str, ...] = ()
    """Those that it is about, where they are few."""


@dataclass(frozen=True)
class ConfigDifference:
    """A setting in which a language model is not the function that the first one is."""

    field: str
    first: str
    other: str
    values: tuple[str, str]
    decides_tensors: bool
    """It decides which tensors there are, or their shapes: nothing can waive it."""


@dataclass(frozen=True)
class Facts:
    """All that was read and measured."""

    sides: tuple[Side, ...]
    reference: Side
    """The base; without one the first model."""
    has_base: bool
    configs: tuple[ConfigDifference, ...]
    misfits: tuple[str, ...]
    """Tensors without a partner of their shape."""
    tokens: tuple[TokenDifferences, ...]
    """Of the first model and each of the others."""
    measured: Measured
    tensors: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By the first model's name, in the order of `sides`."""

    @property
    def compared(self) -> list[Side]:
        """The models in the order of all measured numbers."""
        return [side for side in self.sides if side is not self.reference]

    @property
    def origin(self) -> str:
        """What task vectors are taken from."""
        return self.reference.name

    @functools.cached_property
    def whole(self) -> Sums:
        """Over all tensors but embedding and head, whose rows have a policy of their own."""
        body = [t.sums for t in self.measured.tensors if t.table is None]
        return sum(body, start=Sums.zero(len(self.compared)))


def config_differences(first: Side, other: Side) -> list[ConfigDifference]:
    """The settings in which two language models are not the same function, as `differences:` of a recipe
    names them."""
    pair = first.model.described, other.model.described
    return [
        ConfigDifference(
            name, first.name, other.name, (_value(mine), _value(theirs)), decides_tensors(name, *pair)
        )
        for name, (mine, theirs) in language_settings_apart(*pair).items()
    ]


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "kind", value))


def matrices_of(facts: Facts) -> list[TensorDifference]:
    """Of layers: where the skills are."""
    return [t for t in facts.measured.tensors if t.matrix and t.table is None and t.layer is not None]


def likeness(tensors: Sequence[TensorDifference], index: int) -> float:
    """The median cosine of tensors to those of the reference; 1 where there are none."""
    values = [t.sums.to_reference[index] for t in tensors]
    known = [v for v in values if not math.isnan(v)]
    return float(np.median(known)) if known else 1.0


def base_of(facts: Facts, name: str) -> bool:
    return facts.has_base and name == facts.reference.name


def more(names: Sequence[object]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
