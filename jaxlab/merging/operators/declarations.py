"""What the signature of a merge operator declares: parameters with bounds and markers, what an element of the
output depends on, and what must be known of all tensors. `registry` says how it is read.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.errors import UserError
from jaxlab.merging.numerics import Density, Mode, Share

Vectors = Sequence[Float[Array, "*shape"]]
Weights = Sequence[Float[Array, ""]]
Scalar = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and the greatest value of a parameter."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class InMergekit:
    """The default that mergekit has where the paper has another."""

    default: Any


class PerModel:
    """Marks a parameter that is one number for all models or a list with one for each."""


class NonzeroSum:
    """Marks a switch that divides by the sum of the weights: known weights that sum to zero are refused."""


class Counted:
    """Marks a share of a tensor's elements, which is counted exactly (`Share`) where it is traced."""


class Static:
    """Marks a number that a program is compiled for, as counts and switches are."""


class Asked:
    """Marks a parameter whose default does nothing, so that an injection or a search has to give it."""


Densities = Annotated[Density | Sequence[Density], PerModel(), Bounds(0.0, 1.0), Counted(), Asked()]
"""The share of each task vector that is kept."""

NotNegative = Bounds(0.0, float("inf"))
AtLeastOne = Bounds(1.0, float("inf"))

StaticShare = Annotated[float, Bounds(0.0, 1.0), Static()]

REQUIRED: Any = inspect.Parameter.empty
SUPPLIED = (
    "mode", "dtype", "key", "masks", "offset", "base", "statistics", "layer", "num_layers", "totals",
)  # fmt: skip

Scope = Literal["element", "cut", "row", "tensor", "matrix", "model"]
"""What an element of the output depends on.

element: the same element of the inputs, and its index if it is random: any chunks may be merged apart.
cut: also on where `numerics.largest` cuts the tensor, and the tensor's size (`numerics.size_of`), but on
nothing else: chunks may be merged apart once the cuts are known. A `rescale` to the L1 norm makes it tensor.
row: on its row along the last axis, and on its index if it is random: any rows may be merged apart.
tensor: the whole tensor. matrix: the whole tensor, by matrix products or singular
values. model: what was gathered over all tensors, too.
"""


WIDTH: tuple[Scope, ...] = typing.get_args(Scope)


class NotInjected(typing.NamedTuple):
    """An operator that no injection can use."""

    reason: str


Injection = Callable[..., Any] | Literal["models", "pair"] | NotInjected | None


class Afterwards(typing.NamedTuple):
    """Something done to a merged task vector, whichever operator made it."""

    name: str
    source: str
    function: Callable[..., Any]
    """(merged, task_vectors, **named) -> merged, or without the task vectors."""
    scope: Scope


class Gather(typing.NamedTuple):
    """What an operator on whole models needs to know of all tensors: one round after the other."""

    rounds: int
    measure: Callable[..., Any]
    """(task_vectors, **named) -> a tree of arrays, to be added up over all tensors; `totals` among the named
    holds what the rounds before concluded."""
    conclude: Callable[[Any, Any, Mapping[str, Any]], Any]
    """(sums as NumPy arrays of 64 bits, totals of the rounds before or None, parameters) -> totals."""
    thresholds: "Thresholds | None" = None
    """The totals are thresholds and nothing else; then what is left to do is element by element."""


class Thresholds(typing.NamedTuple):
    """What `Gather` counts, for who finds totals["threshold"] in another way: of each of several scores the
    greatest value (uint32 bits of a float32 magnitude) that so many elements of all tensors reach; 2^32 - 1
    where that is none."""

    scores: Callable[..., Any]
    """(task_vectors, **named) -> a list of scores."""
    kept: Callable[[Mapping[str, Any], int], Sequence[int]]
    """(parameters, elements of all tensors) -> how many shall reach it, for each score."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of an operator, as its signature declares it."""

    name: str
    default: Any
    is_switch: bool
    markers: tuple[Any, ...] = ()
    is_count: bool = False
    """A whole number."""

    @property
    def static(self) -> bool:
        """A program is compiled for its value."""
        return self.is_switch or self.is_count or any(isinstance(marker, Static) for marker in self.markers)

    @property
    def per_model(self) -> bool:
        return any(isinstance(marker, PerModel) for marker in self.markers)

    @property
    def counted(self) -> bool:
        return any(isinstance(marker, Counted) for marker in self.markers)

    @property
    def asked(self) -> bool:
        return any(isinstance(marker, Asked) for marker in self.markers)

    @property
    def needs_nonzero_sum(self) -> bool:
        return any(isinstance(marker, NonzeroSum) for marker in self.markers)

    def default_in(self, mode: Mode) -> Any:
        """The default; mode mergekit may have one of its own."""
        others = [marker.default for marker in self.markers if isinstance(marker, InMergekit)]
        return others[0] if others and mode == "mergekit" else self.default

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as far as it is known: traced ones pass."""
        for bounds in self.markers:
            if isinstance(bounds, Bounds):
                for number in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(number, float | int) and not bounds.low <= number <= bounds.high:
                        if bounds.high == float("inf"):
                            return f"must be {bounds.low:g} or more, is {number}"
                        return f"must be between {bounds.low:g} and {bounds.high:g}, is {number}"
        return None

    def resolve(self, value: Any, count: int, *, plain: bool = False) -> Any:
        """A value as the function takes it: a bool, a float32 scalar, or a list with one for each model.

        Args:
          plain: a known number stays one of Python; nothing is computed.

        Raises:
          UserError: one out of bounds or a list of another length.
        """
        if self.is_switch:
            return bool(value)
        if self.is_count:
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise UserError(f"{self.name} is a whole number, not {value}")
            if problem := self.problem(int(value)):
                raise UserError(f"{self.name} {problem}")
            return int(value)
        if not self.per_model and not isinstance(value, Share) and np.ndim(value) > 0:
            raise UserError(f"{self.name} is one number, not {value}")
        values = per_model(self.name, value, count if self.per_model else 1)
        if problem := self.problem(values):
            raise UserError(f"{self.name} {problem}")
        if self.per_model:
            return [float(x) if isinstance(x, int) else x for x in values]
        if self.counted or self.static:
            return values[0]
        if isinstance(values[0], float | int):
            if plain:
                return float(values[0])
            return jnp.asarray(np.float32(values[0]))  # compiles nothing
        return jnp.asarray(values[0]).astype(jnp.float32)


def per_model(name: str, value: Any, count: int) -> list[Any]:
    """A parameter's value for each model: one for all, or a list.

    Raises:
      UserError: a wrong length.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    is_list = isinstance(value, list | tuple) and not isinstance(value, Share)
    if is_list or (isinstance(value, jax.Array) and value.ndim == 1):
        if len(value) != count:
            raise UserError(f"{name} has {len(value)} values for {count} models")
        values = list(value)
    else:
        values = [value] * count
    return [v.item() if isinstance(v, np.generic) else v for v in values]


@functools.cache
def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(function, include_extras=True)
    result = []
    for name, declared in inspect.signature(function).parameters.items():
        if declared.kind is inspect.Parameter.KEYWORD_ONLY and name not in SUPPLIED:
            hint = hints.get(name, Any)
            markers = getattr(hint, "__metadata__", ())
            kind = typing.get_args(hint)[0] if markers else hint
            public = name.removesuffix("_")
            result.append(Parameter(public, declared.default, kind is bool, markers, kind is int))
    return tuple(result)
