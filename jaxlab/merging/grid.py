"""The search's core: every point of a grid merged and measured on the device, in one compiled program."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.merging.inject import Method, Tensors, combine, layer_weights, prepare, tensor_keys
from jaxlab.merging.inputs import Trio
from jaxlab.merging.plan import Plan
from jaxlab.models import Params

Measure = Callable[[Params, Any], dict[str, Float[Array, ""]]]
"""(parameters, data) -> measures by name; pure, jitted with the merge."""


class Point(NamedTuple):
    """One point of a grid."""

    lambda_v: float
    lambda_e: float
    density: float | None = None


def points(
    lambda_v: Sequence[float], lambda_e: Sequence[float], density: Sequence[float | None]
) -> list[Point]:
    """All combinations, by density first, so that each density is prepared once."""
    return [Point(v, e, d) for d, v, e in itertools.product(density, lambda_v, lambda_e)]


def evaluate_grid(
    plan: Plan,
    method: Method,
    trio: Trio,
    grid: Sequence[Point],
    measure: Measure,
    data: Any,
    *,
    seed: int = 0,
    chunk: int = 8,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[dict[str, float]]:
    """The measures at every point, in the grid's order.

    The base and the task vectors stay on the device, trimmed or masked once for each density; the lambdas are
    traced, so that one program serves the whole grid. `chunk` points are done in one call of it, one after
    the other.

    Args:
      measure, data: what to measure; `data` is a pytree of arrays, the same for every point.
      progress: called with the number of points just done.
    """
    results: list[dict[str, float]] = []
    # The weighting does not know the density: one name for all keeps it one program.
    weighting = with_density(method, 1.0)
    for density, group in itertools.groupby(grid, key=lambda point: point.density):
        thin = with_density(method, density)
        tensors = prepare(plan, thin, trio.vlm, trio.expert, trio.base, tensor_keys(plan, seed))
        for part in _chunks(list(group), chunk):
            lambdas = np.zeros((chunk, 2), np.float32)
            lambdas[: len(part)] = [(point.lambda_v, point.lambda_e) for point in part]
            measured = _measure_points(
                plan, weighting, measure, trio.vlm, tensors, jnp.asarray(lambdas), data
            )
            measured = {name: np.asarray(values)[: len(part)] for name, values in measured.items()}
            results += [
                {name: float(values[i]) for name, values in measured.items()} for i in range(len(part))
            ]
            progress(len(part))
    return results


@functools.partial(jax.jit, static_argnames=("plan", "method", "measure"))
def _measure_points(
    plan: Plan, method: Method, measure: Measure, vlm: Params, tensors: Tensors, lambdas: Array, data: Any
) -> dict[str, Float[Array, " points"]]:
    def at(point: Float[Array, "2"]) -> dict[str, Float[Array, ""]]:
        weights = layer_weights(plan, point[0]), layer_weights(plan, point[1])
        return measure(combine(plan, method, vlm, tensors, *weights), data)

    return jax.lax.map(at, lambdas)


def with_density(method: Method, density: float | None) -> Method:
    """The method with another density, where it has one."""
    return method if method.density is None else dataclasses.replace(method, density=density)


def _chunks(grid: list[Point], size: int) -> Iterator[list[Point]]:
    for start in range(0, len(grid), size):
        yield grid[start : start + size]
