"""The search's core: every point of a grid merged and measured on the device, in one compiled program."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.merging.inject import layer_weights
from jaxlab.merging.inputs import Trio
from jaxlab.merging.plan import Plan
from jaxlab.merging.stages import Method, Tensors, combine, prepare
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
    for density, group in itertools.groupby(grid, key=lambda point: point.density):
        tensors = prepare(plan, method.with_density(density), trio.vlm, trio.expert, trio.base, seed=seed)
        for part in _chunks(list(group), chunk):
            lambdas = np.zeros((chunk, 2), np.float32)
            lambdas[: len(part)] = [(point.lambda_v, point.lambda_e) for point in part]
            measured = _measure_points(
                plan, method.with_density(1.0), measure, trio.vlm, tensors, lambdas, np.int32(len(part)), data
            )
            columns = {name: np.asarray(values) for name, values in measured.items()}
            results += [
                {name: float(column[i]) for name, column in columns.items()} for i in range(len(part))
            ]
            progress(len(part))
    return results


@functools.partial(jax.jit, static_argnames=("plan", "method", "measure"))
def _measure_points(
    plan: Plan,
    method: Method,
    measure: Measure,
    vlm: Params,
    tensors: Tensors,
    lambdas: Any,
    count: Any,
    data: Any,
) -> dict[str, Float[Array, " points"]]:
    """The measures at the first `count` (traced) of the points, one after the other; zeros for the others."""

    def at(point: Float[Array, "2"]) -> dict[str, Float[Array, ""]]:
        weights = layer_weights(plan, point[0]), layer_weights(plan, point[1])
        return measure(combine(plan, method, vlm, tensors, *weights), data)

    def fill(
        i: Int[Array, ""], rows: dict[str, Float[Array, " points"]]
    ) -> dict[str, Float[Array, " points"]]:
        return {name: rows[name].at[i].set(value) for name, value in at(lambdas[i]).items()}

    lambdas = jnp.asarray(lambdas)
    shapes = jax.eval_shape(at, lambdas[0])
    empty = {name: jnp.zeros(len(lambdas), shape.dtype) for name, shape in shapes.items()}
    return jax.lax.fori_loop(jnp.int32(0), count, fill, empty)


def _chunks(grid: list[Point], size: int) -> Iterator[list[Point]]:
    for start in range(0, len(grid), size):
        yield grid[start : start + size]
