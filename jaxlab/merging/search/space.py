"""What a search may try: values or intervals of the lambdas and of an operator's parameters, and a point."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from jaxlab.config import OTHERS, fields_of, suggestion
from jaxlab.errors import ConfigError
from jaxlab.merging.injection import Method
from jaxlab.merging.numerics import Mode
from jaxlab.merging.parameters import named_operator, open_parameters

SearchMethod = Literal["grid", "random", "cma_es", "bayesian", "gradient"]
Layers = Literal["one", "each", "flows"]

LAMBDAS = ("lambda_v", "lambda_e")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """All numbers between two."""

    low: float
    """The least."""
    high: float
    """The greatest."""

    def __post_init__(self) -> None:
        if not -np.inf < self.low < self.high < np.inf:
            raise ConfigError(f"low must be below high, both finite; it is {self.low}", key="high")


Values = tuple[bool | int | float, ...] | Interval


class Point(NamedTuple):
    """One setting of one operator."""

    lambda_v: float
    """Weight of the VLM's task vector; where layers have their own, their mean."""
    lambda_e: float
    """Weight of the expert's task vector, likewise."""
    parameters: tuple[tuple[str, Any], ...] = ()
    """The operator's, by name."""
    layers_v: tuple[float, ...] | None = None
    """Weights of the VLM's task vector, a number for each layer."""
    layers_e: tuple[float, ...] | None = None
    """Weights of the expert's task vector, a number for each layer."""

    @property
    def over_layers(self) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
        """Both lambdas, as a recipe has them."""
        return (
            self.lambda_v if self.layers_v is None else self.layers_v,
            self.lambda_e if self.layers_e is None else self.layers_e,
        )

    def as_row(self) -> dict[str, Any]:
        """Plain values by name."""
        row = {"lambda_v": self.lambda_v, "lambda_e": self.lambda_e, **dict(self.parameters)}
        own = {"layers_v": self.layers_v, "layers_e": self.layers_e}
        return row | {name: list(values) for name, values in own.items() if values is not None}


def point_of_layers(lambdas: Mapping[str, float | Sequence[float]], parameters: Mapping[str, Any]) -> Point:
    """The point of these lambdas, each a number or one for each layer."""
    mean = {n: float(np.mean(np.asarray(v, np.float64))) for n, v in lambdas.items()}
    own = {n: None if isinstance(v, float | int) else tuple(float(x) for x in v) for n, v in lambdas.items()}
    return Point(
        mean["lambda_v"],
        mean["lambda_e"],
        tuple(sorted(parameters.items())),
        own["lambda_v"],
        own["lambda_e"],
    )


@dataclass(frozen=True)
class Space:
    """What is tried of one operator, and how."""

    operator: str = ""
    """Its name in docs/operators.md; by default the key that this stands under."""
    method: Literal["", "grid", "random", "cma_es", "bayesian", "gradient"] = ""
    """How points are chosen; by default as the search says."""
    lambda_v: Values = (1.0,)
    """Weights of the VLM's task vector: a list of values, or {low, high}."""
    lambda_e: Values = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Weights of the expert's task vector."""
    density: Values = ()
    """Shares of the task vectors that are kept, for operators that trim or mask."""
    layers: Layers = "one"
    """one: a lambda for all layers. each: one for each layer, of every lambda that is an interval. flows:
    lambda_e times the layer's share in the expert's information flow."""
    strength: float = 1.0
    """Of layers: flows: how far lambda_e follows the shares; 0 not at all, 1 wholly, below 0 against them."""
    loss: Literal["labels", "entropy"] = "labels"
    """What method gradient goes down: the cross-entropy of right answers, or the entropy of its own."""
    learning_rate: float = 0.03
    """Of Adam, for method gradient."""
    parameters: Annotated[dict[str, Values], OTHERS] = field(default_factory=dict)
    """The operator's other parameters, each a key of its own: a list of values, or {low, high}."""

    def __post_init__(self) -> None:
        for name in LAMBDAS:
            if not getattr(self, name):
                raise ConfigError("an empty list leaves nothing to try", key=name)
            if not isinstance(values := getattr(self, name), Interval) and any(
                isinstance(value, bool) for value in values
            ):
                raise ConfigError("is a list of numbers", key=name)
        for name, values in self.parameters.items():
            if not values:
                raise ConfigError("an empty list leaves nothing to try", key=name)
        if not self.learning_rate > 0:
            raise ConfigError(f"must be above 0, is {self.learning_rate}", key="learning_rate")

    def named(self, label: str, method: SearchMethod) -> "Space":
        """The same with its operator and method spelled out."""
        return dataclasses.replace(self, operator=self.operator or label, method=self.method or method)

    @property
    def dimensions(self) -> dict[str, Values]:
        """Everything that may vary, by name: first the operator's parameters, so that in a grid each of
        their values is prepared once."""
        density = {"density": self.density} if self.density else {}
        return {**density, **self.parameters, "lambda_v": self.lambda_v, "lambda_e": self.lambda_e}

    def points(self) -> list[Point]:
        """All combinations of the lists.

        Raises:
          ConfigError: an interval has no list of points.
        """
        for name, values in self.dimensions.items():
            if isinstance(values, Interval):
                raise ConfigError("method grid takes a list of values, not low and high", key=name)
        lists: list[Any] = list(self.dimensions.values())
        return [
            point_of(dict(zip(self.dimensions, values, strict=True))) for values in itertools.product(*lists)
        ]

    def point_of_row(self, row: Mapping[str, Any]) -> Point:
        """The point that was written down as a row (`Point.as_row`)."""
        own = {n: None if row.get(n) is None else tuple(row[n]) for n in ("layers_v", "layers_e")}
        parameters = {name: row[name] for name in self.dimensions if name not in LAMBDAS}
        return Point(row["lambda_v"], row["lambda_e"], tuple(sorted(parameters.items())), **own)

    def methods(self, mode: Mode) -> list[Method]:
        """The operator with all values of its parameters that can be told beforehand, of intervals the ends.

        Raises:
          ConfigError: one that it does not have or that is out of bounds.
        """
        lists = [
            (values.low, values.high) if isinstance(values, Interval) else values
            for name, values in self.dimensions.items()
            if name not in LAMBDAS
        ]
        names = [name for name in self.dimensions if name not in LAMBDAS]
        return [
            Method.of(self.operator, mode, **dict(zip(names, values, strict=True)))
            for values in itertools.product(*lists)
        ]

    def check(self, mode: Mode) -> None:
        """Whether operator, parameters and method fit together.

        Raises:
          ConfigError: they do not.
        """
        operator = named_operator(self.operator, injected=True)
        if operator.needs_statistics:
            raise ConfigError(
                f"{operator.name} takes statistics of data, which a search does not measure; merge does",
                key="operator",
            )
        known = open_parameters(operator, injected=True)
        for name, values in self.dimensions.items():
            if name in LAMBDAS:
                continue
            if name not in known:
                own = [field for field in fields_of(Space) if field != "density"]  # no word for itself
                hint = suggestion(name, [*own, *known])
                raise ConfigError(f"{self.operator} has none{hint}", key=name)
            whole = known[name].is_switch or known[name].is_count
            if isinstance(values, Interval) and whole:
                raise ConfigError("takes a list of values, not low and high", key=name)
            if not isinstance(values, Interval) and any(
                isinstance(x, bool) != known[name].is_switch for x in values
            ):
                kind = "true and false" if known[name].is_switch else "numbers"
                raise ConfigError(f"is a list of {kind}", key=name)
        for method in self.methods(mode):
            method.check_one_model()
        free = {name for name, values in self.dimensions.items() if isinstance(values, Interval)}
        lists = {n for n, v in self.dimensions.items() if not isinstance(v, Interval) and len(v) > 1}
        if self.method == "grid":
            self.points()
            if self.layers == "each":
                raise ConfigError("a grid has too many points with a lambda for each layer", key="layers")
        if self.method in ("cma_es", "gradient") and lists:
            word = "takes intervals {low, high} and single values"
            raise ConfigError(f"{self.method} {word}, no list of several", key=sorted(lists)[0])
        if self.method == "cma_es" and len(free) < 2 and self.layers != "each":
            raise ConfigError("cma_es needs at least two intervals {low, high}", key="method")
        if self.method == "gradient" and not free & set(LAMBDAS):
            raise ConfigError("gradient learns lambdas; give {low, high} for one", key="lambda_e")
        if self.method == "gradient" and free - set(LAMBDAS):
            key = min(free - set(LAMBDAS))
            raise ConfigError("gradient learns lambdas alone; give one value", key=key)
        if self.layers == "each" and not free & set(LAMBDAS):
            raise ConfigError("each layer's own lambda needs an interval {low, high}", key="layers")


def point_of(values: Mapping[str, Any]) -> Point:
    """The point of these values by name, the lambdas among them."""
    parameters = {name: value for name, value in values.items() if name not in LAMBDAS}
    return point_of_layers({name: float(values[name]) for name in LAMBDAS}, parameters)


def shaped(point: Point, profile: Sequence[float], strength: float = 1.0) -> Point:
    """A point whose lambda_e follows a profile over layers of mean 1: lambda_e (1 + strength (share - 1))."""
    return point._replace(
        layers_e=tuple(point.lambda_e * (1.0 + strength * (share - 1.0)) for share in profile)
    )
