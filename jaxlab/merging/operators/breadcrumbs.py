"""Model breadcrumbs: of each task vector the largest elements go too, as the smallest do."""

from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.merging.numerics import (
    Density,
    Mode,
    as_count,
    floor_count,
    largest,
    multiply,
    rescale_l1,
    size_of,
)
from jaxlab.merging.operators.averaging import weighted_sum
from jaxlab.merging.operators.declarations import (
    Bounds,
    Counted,
    Densities,
    NonzeroSum,
    PerModel,
    Scalar,
    Vectors,
    Weights,
    per_model,
)
from jaxlab.merging.operators.registry import operator
from jaxlab.merging.operators.ties import elected_sum

Shares = Annotated[Density | Sequence[Density], PerModel(), Bounds(0.0, 1.0), Counted()]
BREADCRUMBS = "Davari & Belilovsky 2023, arXiv 2312.06795"


def cut_both_ends(
    task_vectors: Vectors,
    *,
    density: Densities = 1.0,
    gamma: Shares = 0.01,
    rescale: bool = False,
    dtype: jnp.dtype,
) -> list[Float[Array, "*shape"]]:
    """Of each task vector the floor(gamma size) largest elements become zero, and so many of the smallest
    that floor(density size) stay; where density + gamma > 1, fewer of the largest (arXiv 2312.06795, sec. 3:
    its masks by beta and gamma). With `rescale` scaled to the L1 norm before.
    """
    count = len(task_vectors)
    shares = zip(per_model("density", density, count), per_model("gamma", gamma, count), strict=True)
    kept = []
    for x, (share, outliers) in zip(task_vectors, shares, strict=True):
        size = size_of(x)
        middle = as_count(floor_count(share, size))
        top = as_count(floor_count(outliers, size))
        top = jnp.minimum(top, as_count(size) - middle)
        cut = jnp.where(largest(x, middle + top) & ~largest(x, top), x, 0.0)
        kept.append(rescale_l1(cut, x, dtype) if rescale else cut)
    return kept


@operator(BREADCRUMBS, prepare=cut_both_ends, scope="cut")
def breadcrumbs(
    kept: Vectors,
    weights: Weights,
    *,
    normalize: Annotated[bool, NonzeroSum()] = False,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda sum_i w_i d_i of what is between the extremes of the d_i (arXiv 2312.06795, sec. 3)."""
    return multiply(weighted_sum(kept, weights, normalize=normalize, dtype=dtype), lambda_, dtype)


@operator(f"{BREADCRUMBS}, with TIES' election", prepare=cut_both_ends, scope="cut")
def breadcrumbs_ties(
    kept: Vectors,
    weights: Weights,
    *,
    normalize: bool = False,
    lambda_: Scalar = 1.0,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda times TIES' elected sum of what is between the extremes of the d_i (arXiv 2312.06795, with
    2306.01708).
    """
    return multiply(elected_sum(kept, weights, normalize=normalize, mode=mode, dtype=dtype), lambda_, dtype)
