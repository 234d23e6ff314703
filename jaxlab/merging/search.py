"""The search over lambdas and densities: every point of a grid merged and measured on the device, in one
compiled program; what is measured; and questions with the models' answers for people to read.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from jaxlab.data import Source
from jaxlab.errors import ConfigError, UserError
from jaxlab.losses import exact_match
from jaxlab.merging.injection import (
    Method,
    Prepared,
    layer_weights,
    prepare_task_vectors,
    weight_task_vectors,
)
from jaxlab.merging.injection_plan import InjectionPlan
from jaxlab.merging.recipe import Trio
from jaxlab.models import Batch, ModelConfig, Params, forward, generate

Measure = Callable[[Params, Any], dict[str, Float[Array, ""]]]
"""(parameters, data) -> measures by name; pure, jitted with the merge."""

Data = dict[str, list[Batch]]
"""By name of the data set: its batches, those of equal shapes stacked on a leading axis."""


class Point(NamedTuple):
    """One point of a grid."""

    lambda_v: float
    lambda_e: float
    density: float | None = None


@dataclass(frozen=True)
class Grid:
    """The points at which one operator is tried: all combinations."""

    lambda_v: tuple[float, ...] = (1.0,)
    """Weights of the VLM's task vector."""
    lambda_e: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Weights of the expert's task vector."""
    density: tuple[float, ...] = ()
    """Shares of the task vectors that are kept; for ties and dare_* only."""

    def __post_init__(self) -> None:
        for name in ("lambda_v", "lambda_e"):
            if not getattr(self, name):
                raise ConfigError("an empty list leaves nothing to try", key=name)

    def points(self) -> list[Point]:
        """By density first, so that each density is prepared once."""
        product = itertools.product(self.density or (None,), self.lambda_v, self.lambda_e)
        return [Point(v, e, d) for d, v, e in product]


def search_grid(
    plan: InjectionPlan,
    method: Method,
    trio: Trio,
    grid: Grid,
    measure: Measure,
    validation: Data,
    test: Data,
    *,
    choose: Sequence[str],
    seed: int = 0,
    chunk: int = 8,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """One operator tried at every point of its grid: the measures there on validation data, and of the best
    point on test data too. A point's score is the mean of the measures named in `choose`.
    """
    points = grid.points()
    evaluate = functools.partial(evaluate_grid, plan, method, trio, seed=seed, chunk=chunk)
    rows: list[dict[str, Any]] = []
    for point, row in zip(points, evaluate(points, measure, validation, progress=progress), strict=True):
        score = float(np.mean([row[name] for name in choose]))
        rows.append({**point._asdict(), "validation": row, "score": score})
    at = max(range(len(rows)), key=lambda i: rows[i]["score"])  # the first of equals
    (on_test,) = evaluate([points[at]], measure, test)
    return {"points": rows, "evaluations": len(rows), "best": rows[at] | {"test": on_test}}


def evaluate_grid(
    plan: InjectionPlan,
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
        at_density = method.replace(density=density)
        prepared = prepare_task_vectors(plan, at_density, trio.vlm, trio.expert, trio.base, seed=seed)
        for part in itertools.batched(group, chunk):
            lambdas = np.zeros((chunk, 2), np.float32)
            lambdas[: len(part)] = [(point.lambda_v, point.lambda_e) for point in part]
            measured = _measure_points(
                plan, method.switches, measure, trio.vlm, prepared, lambdas, np.int32(len(part)), data
            )
            columns = {name: np.asarray(values) for name, values in measured.items()}
            results += [
                {name: float(column[i]) for name, column in columns.items()} for i in range(len(part))
            ]
            progress(len(part))
    return results


@functools.partial(jax.jit, static_argnames=("plan", "method", "measure"))
def _measure_points(
    plan: InjectionPlan,
    method: Method,
    measure: Measure,
    vlm: Params,
    prepared: dict[str, Prepared],
    lambdas: Any,
    count: Any,
    data: Any,
) -> dict[str, Float[Array, " points"]]:
    """The measures at the first `count` (traced) of the points, one after the other; zeros for the others."""

    def at(point: Float[Array, "2"]) -> dict[str, Float[Array, ""]]:
        weights = layer_weights(plan, point[0]), layer_weights(plan, point[1])
        return measure(weight_task_vectors(plan, method, vlm, prepared, *weights), data)

    def fill(
        i: Int[Array, ""], rows: dict[str, Float[Array, " points"]]
    ) -> dict[str, Float[Array, " points"]]:
        return {name: rows[name].at[i].set(value) for name, value in at(lambdas[i]).items()}

    lambdas = jnp.asarray(lambdas)
    shapes = jax.eval_shape(at, lambdas[0])
    empty = {name: jnp.zeros(len(lambdas), shape.dtype) for name, shape in shapes.items()}
    return jax.lax.fori_loop(jnp.int32(0), count, fill, empty)


def read_data(sources: Mapping[str, Source], split: str, batch_size: int, batches: int) -> Data:
    """The batches of a held-out split of every data set.

    Raises:
      UserError: a set without any.
    """
    data: Data = {}
    for name, source in sources.items():
        found = list(source.held_out_batches(batch_size, batches, split))
        if not found:
            raise UserError(f"{name}: the {split} split has no batch of {batch_size}; lower batch_size")
        data[name] = stack_batches(found)
    return data


def stack_batches(batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Batches of equal shapes on a new leading axis, one dict for each set of shapes."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for batch in batches:
        shapes = tuple(sorted((name, np.shape(value)) for name, value in batch.items()))
        groups.setdefault(shapes, []).append(batch)
    return [jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *group) for group in groups.values()]


@functools.cache
def exact_match_of(config: ModelConfig) -> Measure:
    """(parameters, data) -> the share of sequences, by data set, all of whose targets are the likeliest
    tokens.

    With the answer given and every target predicted from what stands before it, that is what greedy decoding
    would have answered.
    """

    def measure(params: Params, data: Data) -> dict[str, Float[Array, ""]]:
        def matches(batch: Batch) -> Array:
            return exact_match(forward(params, batch, config)[0], batch)

        found = {name: [jax.lax.map(matches, stack).reshape(-1) for stack in data[name]] for name in data}
        return {name: jnp.mean(jnp.concatenate(rows).astype(jnp.float32)) for name, rows in found.items()}

    return measure


def text_only(data: Data) -> Data:
    """The data sets without images."""
    return {name: stacks for name, stacks in data.items() if not any("images" in stack for stack in stacks)}


def measure_model(measure: Measure, params: Params, data: Data) -> dict[str, float]:
    """The measures of one model."""
    return {name: float(value) for name, value in jax.jit(measure)(params, data).items()} if data else {}


def answered(
    models: Mapping[str, Params],
    batch: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` rows of a batch, answered greedily by every model.

    Args:
      models: parameters by name, all of one config.
      batch: rows with one answer each, which loss_mask marks; it ends the row.

    Returns:
      For each row the question, the expected answer, answers by model, and its image, float [height, width]
      in [0, 1], where it has one of a single channel.
    """
    rows = {name: np.asarray(value)[:count] for name, value in batch.items()}
    starts = rows["loss_mask"].argmax(1)
    ends = rows["loss_mask"].shape[1] - rows["loss_mask"][:, ::-1].argmax(1)
    expected = [row[start:end] for row, start, end in zip(rows["tokens"], starts, ends, strict=True)]
    before = np.arange(rows["tokens"].shape[1])[None] < starts[:, None]
    prompts = cast(
        Batch,
        {  # padded with the first token: the answer must not even stand where it is not read
            "tokens": jnp.asarray(np.where(before, rows["tokens"], rows["tokens"][:, :1])[:, : starts.max()]),
            "segment_ids": jnp.asarray(before.astype(np.int32)[:, : starts.max()]),
        }
        | ({"images": jnp.asarray(rows["images"])} if "images" in rows else {}),
    )
    last = {int(answer[-1]) for answer in expected}
    stop = last.pop() if len(last) == 1 else None  # the mark of an end, if answers have one
    longest = max(len(answer) for answer in expected)
    said = {
        name: generate(params, prompts, config, max_new_tokens=longest, stop_token=stop)
        for name, params in models.items()
    }
    examples = []
    for i, answer in enumerate(expected):
        example: dict[str, Any] = {
            "question": tokenizer.decode(rows["tokens"][i, : starts[i]].tolist()),
            "expected": tokenizer.decode(answer.tolist()),
            "answers": {name: tokenizer.decode(_until(tokens[i], stop)) for name, tokens in said.items()},
        }
        if "images" in rows and rows["images"].shape[1] == rows["images"].shape[-1] == 1:
            example["image"] = rows["images"][i, 0, :, :, 0].round(3)
        examples.append(example)
    return examples


def _until(tokens: np.ndarray, stop: int | None) -> list[int]:
    """Tokens before the first `stop`."""
    ids = tokens.tolist()
    return ids[: ids.index(stop)] if stop in ids else ids
