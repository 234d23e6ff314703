"""TIES: trim the task vectors, elect a sign for each element, add up those that agree with it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.merging.numerics import (
    Mode,
    divide,
    kept_count,
    largest,
    multiply,
    rescale_l1,
    size_of,
    total,
)
from jaxlab.merging.operators.declarations import Densities, Scalar, Vectors, Weights, per_model
from jaxlab.merging.operators.registry import operator


def trim(
    task_vectors: Vectors, *, density: Densities = 1.0, rescale: bool = False, dtype: jnp.dtype
) -> list[Float[Array, "*shape"]]:
    """Of each task vector the largest elements stay, as many as its density says (`kept_count`), and the
    others become zero (arXiv 2306.01708, sec. 3, step 1); with `rescale` scaled to the L1 norm before.
    """
    densities = per_model("density", density, len(task_vectors))
    trimmed = [
        jnp.where(largest(x, kept_count(d, size_of(x))), x, 0.0)
        for x, d in zip(task_vectors, densities, strict=True)
    ]
    if not rescale:
        return trimmed
    return [rescale_l1(kept, x, dtype) for kept, x in zip(trimmed, task_vectors, strict=True)]


@operator("Yadav et al. 2023, arXiv 2306.01708", prepare=trim, scope="cut")
def ties(
    trimmed: Vectors,
    weights: Weights,
    *,
    normalize: bool = True,
    lambda_: Scalar = 1.0,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda times the sum of w_i d_i over the trimmed d_i whose sign is the elected one, with `normalize`
    divided by the sum of their w_i (arXiv 2306.01708, algorithm 1).
    """
    elected = elected_sum(trimmed, weights, normalize=normalize, mode=mode, dtype=dtype)
    return multiply(elected, lambda_, dtype)


def elected_sum(
    vectors: Vectors, weights: Weights, *, normalize: bool, mode: Mode, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """TIES' sign election and disjoint merge (arXiv 2306.01708, sec. 3, steps 2 and 3).

    paper: each element's sign is that of the sum of the task vectors, weights aside; vectors of that sign
    enter with their weights, and with `normalize` are divided by the sum of those weights: for equal weights
    their mean. A sum of exactly zero elects nobody, and the element stays the base's.
    mergekit: the *weighted* vectors elect, zero elects plus, and signs are compared after weighting.
    """
    weighted = [multiply(x, w, dtype) for x, w in zip(vectors, weights, strict=True)]
    voters = weighted if mode == "mergekit" else vectors
    votes = total(voters, jnp.dtype(jnp.float32))
    elected = jnp.where(votes >= 0, 1.0, -1.0) if mode == "mergekit" else jnp.sign(votes)
    agree = [(jnp.sign(x) == elected) & (x != 0) for x in voters]
    # A NaN votes, spoils its own election and must not vanish from the result.
    result = total([jnp.where(a | jnp.isnan(x), x, 0.0) for a, x in zip(agree, weighted, strict=True)], dtype)
    if not normalize:
        return result
    divisor = total([jnp.where(a, w, 0.0) for a, w in zip(agree, weights, strict=True)], dtype)
    return divide(result, jnp.where(divisor == 0, 1.0, divisor), dtype)
