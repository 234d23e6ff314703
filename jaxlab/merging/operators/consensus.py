"""Element by element, by what the task vectors have in common: SCE, RAM, MagMax."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.merging.numerics import (
    F32,
    Count,
    Density,
    Mode,
    as_count,
    divide,
    floor_count,
    largest,
    multiply,
    round_to,
    share_of,
    total,
    tree_sum,
)
from jaxlab.merging.operators.declarations import Bounds, Counted, Scalar, Vectors, Weights
from jaxlab.merging.operators.registry import operator

RAM = "Yuan et al. 2026, arXiv 2601.13572"


@operator("Wan et al. 2024, arXiv 2408.07990", scope="tensor")
def sce(
    task_vectors: Vectors,
    *,
    select_topk: Annotated[Density, Bounds(0.0, 1.0), Counted()] = 1.0,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """Select, calculate, erase (arXiv 2408.07990, sec. 3.3): the floor(select_topk size) positions where the
    d_i vary most stay; each model weighs as much as the mean square of what stayed of it; of each position
    the d_i whose sign is that of their sum are averaged by these weights. A sum of zero elects plus.

    mergekit: select_topk is a share of those positions that vary at all.
    """
    count, size = jnp.float32(len(task_vectors)), task_vectors[0].size
    mean = divide(total(task_vectors, F32), count, F32)
    squares = [round_to(jnp.square(round_to(d - mean, F32)), F32) for d in task_vectors]
    variance = divide(total(squares, F32), count, dtype)
    chosen = largest(variance, _selected(variance, select_topk, mode))
    vectors = [jnp.where(chosen, d, 0.0) for d in task_vectors]
    powers = [
        divide(tree_sum(d, of=lambda x: round_to(jnp.square(x), dtype)), jnp.float32(max(size, 1)), dtype)
        for d in vectors
    ]
    whole = total(powers, dtype)
    weights = [divide(p, jnp.where(whole == 0, 1.0, whole), dtype) for p in powers]
    elected = jnp.where(total(vectors, dtype) >= 0, 1.0, -1.0)
    agree = [jnp.where(jnp.sign(d) == elected, w, 0.0) for d, w in zip(vectors, weights, strict=True)]
    # A NaN agrees with nothing, and must not vanish.
    terms = [jnp.where(jnp.isnan(d), d, round_to(d * w, dtype)) for d, w in zip(vectors, agree, strict=True)]
    divisor = total(agree, dtype)
    return divide(total(terms, dtype), jnp.where(divisor == 0, 1.0, divisor), dtype)


def _selected(variance: Float[Array, "*shape"], share: Density, mode: Mode) -> Count:
    """How many positions SCE selects."""
    if mode == "paper":
        return floor_count(share, variance.size)
    varying = jnp.sum(variance != 0, dtype=jnp.uint32)
    count = jnp.floor(share_of(share) * varying.astype(jnp.float32)).astype(jnp.uint32)
    whole = floor_count(share, variance.size)
    # Exact where all vary; and a float32 must not round what is just below a whole number up to it.
    return jnp.where(varying == variance.size, as_count(whole), count)


@operator(RAM)
def ram(task_vectors: Vectors, *, epsilon: Scalar = 1e-5, dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Where several |d_i| exceed epsilon, their mean; where one does, that d_i; elsewhere zero
    (arXiv 2601.13572, RAM).
    """
    ones = [jnp.float32(1.0)] * len(task_vectors)
    return round_to(_shared_and_unique(task_vectors, ones, epsilon, dtype), dtype)


@operator(RAM, scope="tensor")
def ramplus_tl(
    task_vectors: Vectors,
    *,
    r: Scalar = 0.1,
    alpha: Scalar = 0.2,
    epsilon: Scalar = 1e-5,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """RAM whose unique elements are scaled by lambda_i = 1 + r min(rho_i, alpha), rho_i the number of shared
    elements of d_i over that of its unique ones (arXiv 2601.13572, RAM+), counted in this tensor alone.
    """
    changed = [_changed(d, epsilon) for d in task_vectors]
    together = _count_true(changed)
    scales = []
    for mine in changed:
        shared, unique = (jnp.sum(mine & c, dtype=jnp.uint32) for c in (together > 1, together == 1))
        overlap = divide(shared.astype(jnp.float32), jnp.maximum(unique, 1).astype(jnp.float32), F32)
        scales.append(1.0 + multiply(jnp.minimum(overlap, alpha), r, F32))
    return _shared_and_unique(task_vectors, scales, epsilon, dtype)


def _changed(d: Float[Array, "*shape"], epsilon: Scalar) -> Array:
    return ~(jnp.abs(d) <= epsilon)  # a NaN is a change


def _count_true(masks: list[Array]) -> Array:
    return jnp.sum(jnp.stack(masks), axis=0, dtype=jnp.int32)


def _shared_and_unique(
    vectors: Vectors, scales: list[Any], epsilon: Scalar, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    changed = [_changed(d, epsilon) for d in vectors]
    together = _count_true(changed)
    sharing = jnp.maximum(together, 1).astype(jnp.float32)
    terms = []
    for mine, d, scale in zip(changed, vectors, scales, strict=True):
        kept = jnp.where(mine, d, 0.0)
        terms.append(jnp.where(together == 1, multiply(kept, scale, F32), divide(kept, sharing, dtype)))
    return total(terms, F32)


@operator("Marczak et al. 2024, arXiv 2407.06322")
def magmax(
    task_vectors: Vectors, weights: Weights, *, lambda_: Scalar = 1.0, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """lambda times, for each element, that w_i d_i which is largest in magnitude; of equals the last, as in
    the authors' code (arXiv 2407.06322, sec. 4).
    """
    chosen = multiply(task_vectors[0], weights[0], dtype)
    for d, w in zip(task_vectors[1:], weights[1:], strict=True):
        other = multiply(d, w, dtype)
        chosen = jnp.where((jnp.abs(other) >= jnp.abs(chosen)) | jnp.isnan(other), other, chosen)
    return multiply(chosen, lambda_, dtype)
