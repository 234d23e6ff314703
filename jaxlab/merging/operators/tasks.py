"""By masks of the tasks: TALL masks and consensus, EMR (a model for each task), PCB, trust region."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlab.merging.numerics import (
    F32,
    Density,
    as_count,
    divide,
    exponential,
    floor_count,
    hyperbolic_tangent,
    multiply,
    order_statistic,
    round_to,
    total,
    tree_sum,
)
from jaxlab.merging.operators.declarations import (
    Bounds,
    Counted,
    Gather,
    NotNegative,
    PerModel,
    Scalar,
    Vectors,
    Weights,
)
from jaxlab.merging.operators.registry import operator
from jaxlab.merging.operators.thresholds import threshold_gather

TALL = "Wang et al. 2024, arXiv 2405.07813"
EMR = "Huang et al. 2024, arXiv 2405.17461"
MaskLambda = Annotated[Scalar | Sequence[Scalar], PerModel()]


def _weighted(vectors: Vectors, weights: Weights, dtype: jnp.dtype) -> list[Float[Array, "*shape"]]:
    return [multiply(d, w, dtype) for d, w in zip(vectors, weights, strict=True)]


def _tall_masks(
    vectors: Vectors, together: Float[Array, "*shape"], mask_lambda: MaskLambda, dtype: jnp.dtype
) -> list[Bool[Array, "*shape"]]:
    assert isinstance(mask_lambda, Sequence)
    return [
        jnp.abs(d) >= multiply(jnp.abs(round_to(together - d, dtype)), jnp.asarray(m, jnp.float32), dtype)
        for d, m in zip(vectors, mask_lambda, strict=True)
    ]


@operator(TALL, per_task=True)
def tall(
    task_vectors: Vectors,
    weights: Weights,
    *,
    mask_lambda: MaskLambda = 0.4,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> list[Float[Array, "*shape"]]:
    """For each task i its own model, lambda m_i d: of the multi-task vector d = sum_i w_i d_i what the mask
    m_i = |w_i d_i| >= |d - w_i d_i| mask_lambda_i says it needs (arXiv 2405.07813, sec. 3, TALL masks).
    """
    vectors = _weighted(task_vectors, weights, dtype)
    together = total(vectors, dtype)
    masks = _tall_masks(vectors, together, mask_lambda, dtype)
    return [multiply(jnp.where(m | jnp.isnan(together), together, 0.0), lambda_, dtype) for m in masks]


@operator(TALL)
def consensus_ta(
    task_vectors: Vectors,
    weights: Weights,
    *,
    mask_lambda: MaskLambda = 0.4,
    k: Annotated[int, NotNegative] = 2,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda times those elements of d = sum_i w_i d_i that the masks of at least k tasks keep (see `tall`):
    none that only one task wants, none that nobody wants (arXiv 2405.07813, sec. 4, consensus merging).
    """
    vectors = _weighted(task_vectors, weights, dtype)
    together = total(vectors, dtype)
    masks = jnp.stack(_tall_masks(vectors, together, mask_lambda, dtype))
    wanted = jnp.sum(masks, axis=0, dtype=jnp.int32) >= k
    return multiply(jnp.where(wanted | jnp.isnan(together), together, 0.0), lambda_, dtype)


def _elect(vectors: Vectors) -> tuple[Float[Array, "*shape"], list[Float[Array, "*shape"]]]:
    """EMR's unified task vector, and of it what agrees with each task's sign."""
    sign = jnp.sign(total(vectors, F32))
    agree = [jnp.where(d * sign > 0, jnp.abs(d), 0.0) for d in vectors]
    size = agree[0]
    for other in agree[1:]:
        size = jnp.maximum(size, other)
    unified = sign * size
    return unified, [jnp.where(d * unified > 0, unified, 0.0) for d in vectors]


def _emr_sums(task_vectors: Vectors) -> Any:
    _, masked = _elect(task_vectors)
    return {
        "own": jnp.stack([tree_sum(d, of=jnp.abs) for d in task_vectors]),
        "kept": jnp.stack([tree_sum(m, of=jnp.abs) for m in masked]),
    }


def _emr_totals(sums: Any, before: Any, parameters: Mapping[str, Any]) -> Any:
    return {name: np.asarray(value, np.float32) for name, value in sums.items()}


@operator(EMR, scope="model", per_task=True, gather=Gather(1, _emr_sums, _emr_totals))
def emr(
    task_vectors: Vectors, weights: Weights, *, totals: Any = None, dtype: jnp.dtype
) -> list[Float[Array, "*shape"]]:
    """Elect, mask, rescale: for each task i its own model, w_i r_i m_i d (arXiv 2405.17461, sec. 3.2). The
    unified d has the sign of sum_i d_i and of those d_i that have it the largest magnitude; m_i is where d
    and d_i agree; r_i = sum |d_i| / sum |m_i d|, over all tensors.

    A weight scales its task's model alone. Alone a tensor is the whole model.
    """
    _, masked = _elect(task_vectors)
    sums = _emr_sums(task_vectors) if totals is None else totals
    kept = jnp.asarray(sums["kept"])
    rescale = divide(jnp.asarray(sums["own"]), jnp.where(kept == 0, 1.0, kept), F32)
    result = []
    for i, (m, d, w) in enumerate(zip(masked, task_vectors, weights, strict=True)):
        scaled = multiply(multiply(m, rescale[i], dtype), w, dtype)
        result.append(jnp.where(jnp.isnan(d), d, scaled))
    return result


@operator("Du et al. 2024, arXiv 2410.02396", scope="tensor")
def pcb(
    task_vectors: Vectors,
    weights: Weights,
    *,
    ratio: Annotated[Density, Bounds(0.0, 1.0), Counted()] = 0.1,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """Parameter competition balancing (arXiv 2410.02396, sec. 3, as its authors' code has it): lambda times
    the mean of the w_i d_i with the weights s_i, sum_i s_i w_i d_i / sum_i s_i.

    s_i is the score b_i = exp(n N(|d_i|)^2) tanh(d_i sum_j d_j) of n models, all but the `ratio` largest
    raised to the least of these, then N: scaled to 0 ... 1. |d_i| is clipped to its 1e-4 and 1 - 1e-4
    quantiles first. The authors do this for all tensors as one; here each tensor is scaled by itself.
    """
    count, size = len(task_vectors), task_vectors[0].size
    if size == 0:
        return task_vectors[0]
    together = total(task_vectors, F32)
    scores, clipped = [], []
    low, high = int(size * 1e-4), int(size * (1 - 1e-4) - 1)
    for d in task_vectors:
        magnitude = jnp.abs(d)
        bounds = (order_statistic(magnitude, max(rank, 0)) for rank in (low, high))
        magnitude = jnp.clip(magnitude, *bounds)
        clipped.append(jnp.sign(d) * magnitude)
        share = _to_unit(magnitude)
        within = exponential(count * round_to(share * share, F32))
        score = within * hyperbolic_tangent(round_to(d * together, F32))
        score = round_to(score, F32)
        kept = as_count(floor_count(ratio, size))
        least = order_statistic(score, jnp.uint32(size) - jnp.clip(kept, 1, size))
        scores.append(_to_unit(jnp.maximum(score, least)))
    terms = [
        round_to(multiply(d, w, dtype) * s, dtype) for d, w, s in zip(clipped, weights, scores, strict=True)
    ]
    divisor = jnp.maximum(total(scores, F32), 1e-12)
    return multiply(divide(total(terms, dtype), divisor, dtype), lambda_, dtype)


def _to_unit(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    least, greatest = jnp.min(x), jnp.max(x)
    span = greatest - least
    return divide(x - least, jnp.where(span == 0, 1.0, span), F32)


def _sensitivity(task_vectors: Vectors, statistics: Any = None) -> Float[Array, "*shape"]:
    """The Omega of `trust_region`."""
    gradients = [jnp.abs(d) for d in task_vectors] if statistics is None else list(statistics)
    pairs = [
        round_to(jnp.asarray(g, jnp.float32) * jnp.abs(d), F32)
        for i, g in enumerate(gradients)
        for j, d in enumerate(task_vectors)
        if i != j
    ]
    return total(pairs, F32) if pairs else jnp.zeros_like(task_vectors[0])


@operator(
    "Sun et al. 2025, arXiv 2501.15065",
    scope="model",
    gather=threshold_gather(
        lambda task_vectors, statistics=None: [_sensitivity(task_vectors, statistics)],
        lambda parameters, size: [size - min(int(size * parameters["quantile"]), size - 1)],
    ),
)
def trust_region(
    task_vectors: Vectors,
    weights: Weights,
    *,
    quantile: Annotated[Density, Bounds(0.0, 1.0), Counted()] = 0.99,
    lambda_: Scalar = 1.0,
    statistics: Any = None,
    totals: Any = None,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda sum_i w_i d_i where Omega = sum_{i != j} |g_i| |d_j| is below its quantile over all tensors, the
    base elsewhere: no step along which another task's loss is steep (arXiv 2501.15065, sec. 4).

    `statistics`: for each model the mean absolute gradient of its task's loss at the base, of the tensor's
    shape. Without, |d_i| stands for it (zero-shot). Alone a tensor is the whole model.
    """
    omega = _sensitivity(task_vectors, statistics)
    if totals is None:
        rank = as_count(floor_count(quantile, omega.size))
        threshold = order_statistic(omega, jnp.minimum(rank, max(omega.size - 1, 0)))
    else:
        threshold = jax.lax.bitcast_convert_type(jnp.asarray(totals["threshold"][0]), jnp.float32)
    terms = _weighted(task_vectors, weights, dtype)
    summed = total(terms, dtype)
    inside = (omega < threshold) | jnp.isnan(summed)
    return multiply(jnp.where(inside, summed, 0.0), lambda_, dtype)
