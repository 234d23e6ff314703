"""What a merge operator is: a function whose signature declares it, registered by a decorator.

    @operator("Ilharco et al. 2022, arXiv 2212.04089")
    def task_arithmetic(task_vectors, weights, *, normalize: bool = False, lambda_: Scalar = 1.0, dtype):

The names in the signature say what the operator takes:

    task_vectors    what it merges, float32: x_i - base. It returns the merged task vector, which the caller
                    adds to the base.
    models          or the models' tensors themselves, float32. It returns the merged tensor.
    weights         float32 scalars, one for each.
    mode, dtype     "paper" or "mergekit", and the dtype that intermediate results are rounded to.
    key, masks      random numbers: uint32[2] made of seed and tensor name; or masks given in their place.
    base            the base's tensor, float32, or None (for operators on models).
    the others      are the operator's parameters under mergekit's names (lambda_ is lambda): their defaults,
                    and in `Annotated` their bounds and markers. bool is a switch; all else may be traced.

Operators are pure, may be jitted and vmapped, and give the same bits in every such setting. NaN in an input
gives NaN in that element of the output, unless trimming or a mask dropped it.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

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


Densities = Annotated[Density | Sequence[Density], PerModel(), Bounds(0.0, 1.0)]
"""The share of each task vector that is kept."""

REQUIRED: Any = inspect.Parameter.empty
_SUPPLIED = ("mode", "dtype", "key", "masks", "base", "statistics")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of an operator, as its signature declares it."""

    name: str
    """mergekit's, and that in recipes."""
    default: Any
    """REQUIRED: it must be given."""
    is_switch: bool
    markers: tuple[Any, ...] = ()

    @property
    def per_model(self) -> bool:
        return any(isinstance(marker, PerModel) for marker in self.markers)

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
                        return f"must be between {bounds.low:g} and {bounds.high:g}, is {number}"
        return None

    def resolve(self, value: Any, count: int) -> Any:
        """A value as the function takes it: a bool, a float32 scalar, or a list with one for each model.

        Raises:
          UserError: one out of bounds or a list of another length.
        """
        if self.is_switch:
            return bool(value)
        if not self.per_model and np.ndim(value) > 0:
            raise UserError(f"{self.name} is one number, not {value}")
        values = per_model(self.name, value, count if self.per_model else 1)
        if problem := self.problem(values):
            raise UserError(f"{self.name} {problem}")
        if self.per_model:
            return [float(x) if isinstance(x, int) else x for x in values]
        return jnp.asarray(values[0]).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Operator:
    """One merge operator, in two stages that a search runs apart from each other."""

    name: str
    source: str
    """Where it was published."""
    function: Callable[..., Any]
    """As declared. Its first argument is what `preparation` returned, if there is one."""
    preparation: Callable[..., Any] | None = None
    injection: Callable[..., Any] | None = None
    """In place of `function` when an injection says (lambda_v, lambda_e) to an operator without weights."""

    @property
    def parameters(self) -> dict[str, Parameter]:
        """By mergekit's names, without the weights."""
        return {p.name: p for f in self._stages for p in _parameters(f)}

    @property
    def of_models(self) -> bool:
        """Merges models themselves, not task vectors."""
        return next(iter(inspect.signature(self._stages[0]).parameters)) == "models"

    @property
    def random(self) -> bool:
        """Needs a key."""
        return self.takes("key")

    def takes(self, name: str) -> bool:
        """Whether a stage has an argument of this name."""
        return any(name in inspect.signature(stage).parameters for stage in self._stages)

    @property
    def _stages(self) -> list[Callable[..., Any]]:
        return [*([self.preparation] if self.preparation else []), self.function]

    @property
    def for_injection(self) -> "Operator":
        """The operator as an injection calls it, with a weight for each task vector."""
        return self if self.injection is None else dataclasses.replace(self, function=self.injection)

    def resolve(self, given: Mapping[str, Any], count: int, mode: Mode) -> dict[str, Any]:
        """The value of every parameter, from those given and the defaults.

        Raises:
          UserError: one that is missing or out of bounds.
        """
        values = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default_in(mode))
            if value is REQUIRED:
                raise UserError(f"{self.name} needs the parameter {name}")
            values[name] = parameter.resolve(value, count)
        return values

    def prepare(self, tensors: Vectors, values: Mapping[str, Any], **supplied: Any) -> Any:
        """What weights have no part in, such as trimming, random masks and angles: a pytree of arrays."""
        if self.preparation is None:
            return list(tensors)
        return _call(self.preparation, (tensors,), values, supplied)

    def combine(self, prepared: Any, weights: Weights, values: Mapping[str, Any], **supplied: Any) -> Array:
        """The merged task vector, or of an operator on models the merged tensor; float32."""
        takes_weights = "weights" in inspect.signature(self.function).parameters
        positional = (prepared, weights) if takes_weights else (prepared,)
        return _call(self.function, positional, values, supplied)


OPERATORS: dict[str, Operator] = {}
"""All merge operators by name, which is mergekit's."""


def operator(
    source: str, *, prepare: Callable[..., Any] | None = None, inject: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the merge operator of its name; the function stays what it is.

    Args:
      source: where it was published.
      prepare: a first stage that needs no weights. A search runs it once for many weights, so all that sums
        over a tensor belongs there: the order of such a sum may change with the program around it.
      inject: for an operator without weights, (prepared, weights, ...) -> merged: what the lambdas of an
        injection mean to it.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        if name in OPERATORS:
            raise ValueError(f"there are two operators named {name}")
        entry = Operator(name, source, function, prepare, inject)
        first = next(iter(inspect.signature(entry._stages[0]).parameters))
        if first not in ("task_vectors", "models"):
            raise TypeError(f"{name}: the first argument is task_vectors or models, not {first}")
        if not entry.for_injection.takes("weights"):
            raise TypeError(f"{name} has no weights; say with inject= what an injection's lambdas mean to it")
        OPERATORS[name] = entry
        return function

    return register


def operator_named(method: str) -> Operator:
    """Refuses a method that does not exist.

    Raises:
      UserError: there is no such method.
    """
    if method not in OPERATORS:
        raise UserError(f"no merge method {method!r}; there are {', '.join(sorted(OPERATORS))}")
    return OPERATORS[method]


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
def _parameters(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(function, include_extras=True)
    result = []
    for name, declared in inspect.signature(function).parameters.items():
        if declared.kind is inspect.Parameter.KEYWORD_ONLY and name not in _SUPPLIED:
            hint = hints.get(name, Any)
            markers = getattr(hint, "__metadata__", ())
            is_switch = (typing.get_args(hint)[0] if markers else hint) is bool
            result.append(Parameter(name.removesuffix("_"), declared.default, is_switch, markers))
    return tuple(result)


def _call(
    function: Callable[..., Any],
    positional: tuple[Any, ...],
    values: Mapping[str, Any],
    supplied: Mapping[str, Any],
) -> Any:
    """The function with those of its parameters, and of what is supplied, that it has."""
    wanted = inspect.signature(function).parameters
    named = {name: value for name, value in supplied.items() if name in wanted}
    named |= {name: values[key] for name in wanted if (key := name.removesuffix("_")) in values}
    return function(*positional, **named)
