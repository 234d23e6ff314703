"""Lambdas by gradient: the loss of the merged model has an exact one for every layer's lambdas, through the
merge that the scanned forward does (jaxlab/merging/in_forward.py).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.losses import target_losses
from jaxlab.merging.in_forward import MergedInForward
from jaxlab.merging.injection import Method, Prepared
from jaxlab.merging.injection_plan import InjectionPlan
from jaxlab.merging.operators.optimized import adam
from jaxlab.merging.search.measures import answer_greedily, predict
from jaxlab.merging.search.space import LAMBDAS, Interval, Point, Space, point_of_layers
from jaxlab.models import Batch, ModelConfig, Params

PASSES = {"labels": 3, "entropy": 4}
"""Forward passes that a step is counted as: a backward pass as two, and with entropy the answers as one."""


class State(NamedTuple):
    """Lambdas on their way, float32[2, L], or [2, 1] where all layers have one; and Adam's moments."""

    lambdas: Any
    first: Any
    second: Any


class Batches(NamedTuple):
    """What is learned on: batches in turn, each with the longest answer of its data set and what ends one."""

    batches: Sequence[Batch]
    answers: Sequence[tuple[int, int]]


class Schedule(NamedTuple):
    """How a budget of evaluations is spent: a batch's step costs its passes times its share of the data."""

    measured: int
    """Points that are measured, evenly over the steps, the last one after all."""
    steps: int

    @classmethod
    def of(cls, budget: int, passes: int, batches: int) -> "Schedule":
        """A quarter of the evaluations measure points, at least one; the others are spent on steps."""
        measured = max(1, budget // 4)
        return cls(measured, (budget - measured) * batches // passes)

    def until(self, point: int) -> int:
        """Steps before a point is measured."""
        return self.steps * (point + 1) // self.measured


def start(space: Space, num_layers: int) -> State:
    """The middle of each interval, and the values of what is fixed."""
    middle = [
        (v.low + v.high) / 2 if isinstance(v, Interval) else float(v[0])
        for v in (space.dimensions[name] for name in LAMBDAS)
    ]
    shape = (2, num_layers if space.layers == "each" else 1)
    lambdas = np.broadcast_to(np.asarray(middle, np.float32)[:, None], shape)
    return State(lambdas, np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def point_at(space: Space, state: State) -> Point:
    """The point of these lambdas."""
    parameters = {
        n: v[0] for n, v in space.dimensions.items() if n not in LAMBDAS and not isinstance(v, Interval)
    }
    values = np.asarray(state.lambdas)
    lambdas = {}
    for i, name in enumerate(LAMBDAS):
        own = space.layers == "each" and isinstance(space.dimensions[name], Interval)
        lambdas[name] = [float(x) for x in values[i]] if own else float(values[i, 0])
    return point_of_layers(lambdas, parameters)


def descend(
    plan: InjectionPlan,
    method: Method,
    config: ModelConfig,
    vlm: Params,
    prepared: dict[str, Prepared],
    space: Space,
    data: Batches,
    state: State,
    first: int,
    last: int,
) -> tuple[State, list[float]]:
    """Steps first ... last - 1 of Adam within the intervals, and the loss before each.

    The gradient of a step is exact on its batch; batches are taken in turn.
    """
    frugal = dataclasses.replace(config, remat="layer")
    bounds = np.asarray(
        [
            (v.low, v.high) if isinstance(v, Interval) else (v[0], v[0])
            for v in (space.dimensions[name] for name in LAMBDAS)
        ],
        np.float32,
    )
    losses = []
    for step in range(first, last):
        at = step % len(data.batches)
        state, loss = _step(
            plan,
            method.switches,
            frugal,
            space.loss,
            *data.answers[at],
            vlm,
            prepared,
            state,
            np.float32(step + 1),
            np.float32(space.learning_rate),
            bounds,
            data.batches[at],
        )
        losses.append(float(loss))
    return state, losses


def lambda_loss(
    model: MergedInForward,
    batch: Batch,
    config: ModelConfig,
    kind: Literal["labels", "entropy"],
    longest: int,
    stop: int,
) -> Float[Array, ""]:
    """The mean cross-entropy of the right answers, or the mean entropy of predictions along the answers that
    the model gives by itself (AdaMerging, arXiv 2310.02575, eq. 5, there of classes)."""
    if kind == "labels":
        losses, mask = target_losses(predict(model, batch, config).logits, batch)
        return jnp.sum(losses, where=mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    fixed = jax.lax.stop_gradient(model.lambdas)
    made, _ = answer_greedily(dataclasses.replace(model, lambdas=fixed), batch, config, longest, stop)
    tokens, starts = batch["tokens"], jnp.argmax(batch["loss_mask"], axis=1)
    offset = jnp.arange(tokens.shape[1])[None] - starts[:, None]
    answer = jnp.take_along_axis(made, jnp.clip(offset, 0, longest - 1), axis=1)
    inside = (offset >= 0) & (offset < longest) & (answer >= 0)
    text = jnp.where(inside, answer, jnp.where(offset < 0, tokens, tokens[:, :1]))
    rest = {name: x for name, x in batch.items() if name not in ("tokens", "segment_ids", "loss_mask")}
    logits = predict(model, cast(Batch, {**rest, "tokens": text}), config).logits[:, :-1]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    spread = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    counted = inside[:, 1:]
    return jnp.sum(spread, where=counted) / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


@functools.partial(jax.jit, static_argnames=("plan", "method", "config", "kind", "longest", "stop"))
def _step(
    plan: InjectionPlan,
    method: Method,
    config: ModelConfig,
    kind: Literal["labels", "entropy"],
    longest: int,
    stop: int,
    vlm: Params,
    prepared: dict[str, Prepared],
    state: State,
    count: Any,
    learning_rate: Any,
    bounds: Any,
    batch: Batch,
) -> tuple[State, Array]:
    """One step of Adam (arXiv 1412.6980, algorithm 1), clipped to the bounds [2, 2]."""

    def loss(lambdas: Array) -> Array:
        every = jnp.broadcast_to(lambdas, (2, plan.num_layers))
        return lambda_loss(
            MergedInForward(plan, method, vlm, prepared, every), batch, config, kind, longest, stop
        )

    lambdas = jnp.asarray(state.lambdas)
    value, gradient = jax.value_and_grad(loss)(lambdas)
    update, (first, second) = adam(gradient, (jnp.asarray(state.first), jnp.asarray(state.second)), count)
    moved = jnp.clip(lambdas - learning_rate * update, bounds[:, :1], bounds[:, 1:])
    return State(moved, first, second), value


def learned_on(
    data: dict[str, list[Batch]], names: Sequence[str], answers: dict[str, tuple[int, int]]
) -> Batches:
    """The batches of some data sets, one after the other in turn.

    Args:
      answers: of each the longest answer and what ends one, where they are needed.
    """

    def unstacked(name: str) -> Iterator[Batch]:
        for stack in data[name]:
            for i in range(stack["tokens"].shape[0]):
                yield cast(Batch, jax.tree.map(lambda x, i=i: x[i], stack))

    of_name = {name: list(unstacked(name)) for name in names}
    rounds = max(len(batches) for batches in of_name.values())
    pairs = [(n, b[i]) for i in range(rounds) for n, b in of_name.items() if i < len(b)]
    return Batches([batch for _, batch in pairs], [answers.get(n, (0, -1)) for n, _ in pairs])
