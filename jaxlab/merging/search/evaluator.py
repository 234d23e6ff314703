"""Points of a search measured on the device: base and task vectors stay there, and one program serves all
points of an operator.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.merging.in_forward import MergedInForward, tensor_weights
from jaxlab.merging.injection import Method, Prepared, prepare_task_vectors, weight_task_vectors
from jaxlab.merging.injection_plan import InjectionPlan
from jaxlab.merging.numerics import Mode
from jaxlab.merging.recipe import Trio
from jaxlab.merging.search.measures import Measure
from jaxlab.merging.search.space import Point
from jaxlab.models import Params

Measured = dict[str, Any]
"""By name: a number, or a NumPy array."""

OnModel = Callable[[Params], Mapping[str, Any]]
"""Measures a merged model, not in one program with the merge, such as by what it generates."""


class Evaluator:
    """Merges points and measures them.

    Task vectors are prepared once for all points of the same parameters that follow each other.
    """

    def __init__(
        self,
        plan: InjectionPlan,
        trio: Trio,
        *,
        mode: Mode = "paper",
        seed: int = 0,
        chunk: int = 8,
        in_forward: bool = False,
    ) -> None:
        """
        Args:
          seed: of random masks.
          chunk: points that are done in one call of the program, one after the other.
          in_forward: merge layer by layer where they run, so that no merged copy exists.
        """
        self.plan, self.trio, self.mode, self.seed = plan, trio, mode, seed
        self.chunk, self.in_forward = chunk, in_forward
        self._prepared: tuple[Method, dict[str, Prepared]] | None = None

    def method(self, operator: str, point: Point) -> Method:
        """The operator with a point's parameters."""
        return Method.of(operator, self.mode, **dict(point.parameters))

    def prepared(self, method: Method) -> dict[str, Prepared]:
        """Task vectors, trimmed or masked."""
        if self._prepared is None or self._prepared[0] != method:
            self._prepared = None  # two of them need not fit
            trio = self.trio
            found = prepare_task_vectors(self.plan, method, trio.vlm, trio.expert, trio.base, seed=self.seed)
            self._prepared = method, found
        return self._prepared[1]

    def merged(self, operator: str, point: Point) -> Params:
        """The model of a point: what `inject` makes of its recipe, bit for bit."""
        method = self.method(operator, point)
        weights = [tensor_weights(self.plan, jnp.asarray(x)) for x in self.lambdas(point)]
        return weight_task_vectors(self.plan, method, self.trio.vlm, self.prepared(method), *weights)

    def lambdas(self, point: Point) -> Float[np.ndarray, "2 L"]:
        """Both lambdas of every layer."""
        return np.stack(
            [np.broadcast_to(np.asarray(x, np.float32), self.plan.num_layers) for x in point.over_layers]
        )

    def __call__(
        self,
        operator: str,
        points: Sequence[Point],
        measure: Measure | None,
        data: Any,
        on_model: Sequence[OnModel] = (),
        progress: Callable[[int], Any] = lambda count: None,
    ) -> list[Measured]:
        """The measures at every point, in their order.

        Args:
          measure, data: what to measure within the program; `data` is a pytree of arrays.
          on_model: what to measure besides, of each merged model.
          progress: called with the number of points just done.
        """
        results: list[Measured] = [{} for _ in points]
        groups: dict[Method, list[int]] = {}
        for i, point in enumerate(points):
            groups.setdefault(self.method(operator, point), []).append(i)
        for method, members in groups.items():
            prepared = self.prepared(method)
            for part in map(list, _batched(members, self.chunk)):
                if measure is not None:
                    lambdas = np.zeros((self.chunk, 2, self.plan.num_layers), np.float32)
                    lambdas[: len(part)] = [self.lambdas(points[i]) for i in part]
                    measured = _measure_points(
                        self.plan,
                        method.switches,
                        measure,
                        self.trio.vlm,
                        prepared,
                        lambdas,
                        np.int32(len(part)),
                        data,
                        in_forward=self.in_forward,
                    )
                    columns = {name: np.asarray(values) for name, values in measured.items()}
                    for row, i in enumerate(part):
                        results[i] |= {n: _plain(column[row]) for n, column in columns.items()}
                for i in part if on_model else ():
                    merged = self.merged(operator, points[i])
                    for measure_model in on_model:
                        results[i] |= measure_model(merged)
                progress(len(part))
        return results


def _batched(members: Sequence[int], size: int) -> list[Sequence[int]]:
    return [members[i : i + size] for i in range(0, len(members), size)]


def _plain(value: Any) -> Any:
    """A number of Python's for a scalar."""
    return value.item() if np.ndim(value) == 0 else value


@functools.partial(jax.jit, static_argnames=("plan", "method", "measure", "in_forward"))
def _measure_points(
    plan: InjectionPlan,
    method: Method,
    measure: Measure,
    vlm: Params,
    prepared: dict[str, Prepared],
    lambdas: Any,
    count: Any,
    data: Any,
    *,
    in_forward: bool,
) -> dict[str, Array]:
    """The measures at the first `count` (traced) of the points, float32[points, 2, L], one after the other;
    zeros for the others."""

    def at(point: Float[Array, "2 L"]) -> dict[str, Array]:
        if in_forward:
            return measure(MergedInForward(plan, method, vlm, prepared, point), data)
        weights = [tensor_weights(plan, point[i]) for i in range(2)]
        return measure(weight_task_vectors(plan, method, vlm, prepared, *weights), data)

    def fill(i: Int[Array, ""], rows: dict[str, Array]) -> dict[str, Array]:
        return {name: rows[name].at[i].set(value) for name, value in at(lambdas[i]).items()}

    lambdas = jnp.asarray(lambdas)
    shapes = jax.eval_shape(at, lambdas[0])
    empty = {n: jnp.zeros((len(lambdas), *shape.shape), shape.dtype) for n, shape in shapes.items()}
    return jax.lax.fori_loop(jnp.int32(0), count, fill, empty)
