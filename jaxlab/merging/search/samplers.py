"""Where the next points come from: a grid, chance, or optuna's CMA-ES and TPE asked and told.

A sampler is a function of its seed and of what it was told, so that a search which was killed asks for the
same points again.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlab.errors import UserError
from jaxlab.merging.search.space import LAMBDAS, Interval, Point, Space, Values, point_of_layers, shaped

Shape = Callable[[Point], Point]
"""Gives a point's lambdas their profile over layers."""


@runtime_checkable
class Sampler(Protocol):
    """Gives points, and learns how good they were."""

    def ask(self, count: int) -> list[Point]:
        """The next points."""
        ...

    def tell(self, scores: Sequence[float]) -> None:
        """The scores of the points asked for last, in their order; more is better."""
        ...


def make_sampler(
    space: Space, budget: int, num_layers: int, seed: int, profile: Sequence[float] | None = None
) -> Sampler:
    """The sampler of a space whose operator and method are spelled out.

    Args:
      budget: how many points will be asked for.
      profile: of lambda_e over the layers; used where the space has `layers: flows`.

    Raises:
      UserError: optuna is not installed.
    """
    shape: Shape = lambda point: point
    if space.layers != "flows":
        pass
    elif profile is None:
        raise ValueError("layers: flows needs a profile")
    else:
        shape = lambda point: shaped(point, profile, space.strength)
    if space.method == "grid":
        points = space.points()
        return _Listed([shape(point) for point in points])
    dimensions = _spread(space, num_layers)
    if space.method == "random":
        return _Random(dimensions, seed, shape)
    return _Optuna(dimensions, space.method, seed, budget, shape)


def _spread(space: Space, num_layers: int) -> dict[str, Values]:
    """The dimensions, with one for each layer where lambdas have their own: lambda_e.0, lambda_e.1, ..."""
    result: dict[str, Values] = {}
    for name, values in space.dimensions.items():
        if name in LAMBDAS and space.layers == "each" and isinstance(values, Interval):
            result |= {f"{name}.{layer}": values for layer in range(num_layers)}
        else:
            result[name] = values
    return result


def _gathered(values: dict[str, Any], shape: Shape) -> Point:
    lambdas: dict[str, Any] = {}
    parameters = {}
    for name, value in values.items():
        whose, dot, _ = name.partition(".")
        if whose in LAMBDAS and dot:
            lambdas.setdefault(whose, []).append(float(value))
        elif whose in LAMBDAS:
            lambdas[whose] = float(value)
        else:
            parameters[name] = value
    return shape(point_of_layers(lambdas, parameters))


class _Listed:
    def __init__(self, points: Sequence[Point]) -> None:
        self._points = iter(points)

    def ask(self, count: int) -> list[Point]:
        return list(itertools.islice(self._points, count))

    def tell(self, scores: Sequence[float]) -> None:
        pass


class _Random:
    def __init__(self, dimensions: dict[str, Values], seed: int, shape: Shape) -> None:
        self._dimensions, self._shape = dimensions, shape
        self._rng = np.random.default_rng(seed)

    def ask(self, count: int) -> list[Point]:
        return [self._one() for _ in range(count)]

    def _one(self) -> Point:
        values = {
            name: self._rng.uniform(v.low, v.high)
            if isinstance(v, Interval)
            else v[self._rng.integers(len(v))]
            for name, v in self._dimensions.items()
        }
        return _gathered(values, self._shape)

    def tell(self, scores: Sequence[float]) -> None:
        pass


class _Optuna:
    def __init__(
        self,
        dimensions: dict[str, Values],
        method: str,
        seed: int,
        budget: int,
        shape: Shape,
    ) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise UserError(f"method {method} comes with optuna; install the extra `search`") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._shape = shape
        free = {n: v for n, v in dimensions.items() if isinstance(v, Interval) or len(v) > 1}
        self._fixed = {n: v[0] for n, v in dimensions.items() if not isinstance(v, Interval) and len(v) == 1}
        distributions = optuna.distributions
        self._distributions: dict[str, Any] = {
            name: distributions.FloatDistribution(v.low, v.high)
            if isinstance(v, Interval)
            else distributions.CategoricalDistribution(v)
            for name, v in free.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if method == "cma_es":
                population = max(4, min(budget // 4, 4 + int(3 * np.log(len(free)))))
                chosen: Any = optuna.samplers.CmaEsSampler(seed=seed, popsize=population)
            else:
                start = max(1, min(10, budget // 4))
                chosen = optuna.samplers.TPESampler(seed=seed, n_startup_trials=start, constant_liar=True)
            self._study = optuna.create_study(direction="maximize", sampler=chosen)
        self._asked: list[Any] = []

    def ask(self, count: int) -> list[Point]:
        self._asked = [self._study.ask(self._distributions) for _ in range(count)]
        return [_gathered({**self._fixed, **trial.params}, self._shape) for trial in self._asked]

    def tell(self, scores: Sequence[float]) -> None:
        for trial, score in zip(self._asked, scores, strict=True):
            self._study.tell(trial, score)
