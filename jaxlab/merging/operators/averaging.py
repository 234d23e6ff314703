"""Weighted sums: linear (model soups) and task arithmetic."""

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.merging.numerics import divide, multiply, total
from jaxlab.merging.operators.declarations import NonzeroSum, Scalar, Vectors, Weights
from jaxlab.merging.operators.registry import operator


@operator("Wortsman et al. 2022, arXiv 2203.05482", in_float32=True)
def linear(
    models: Vectors,
    weights: Weights,
    *,
    normalize: Annotated[bool, NonzeroSum()] = True,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """sum_i w_i x_i / sum_i w_i; without `normalize` undivided (arXiv 2203.05482, sec. 2)."""
    return weighted_sum(models, weights, normalize=normalize, dtype=dtype)


@operator("Ilharco et al. 2022, arXiv 2212.04089")
def task_arithmetic(
    task_vectors: Vectors,
    weights: Weights,
    *,
    normalize: Annotated[bool, NonzeroSum()] = False,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda sum_i w_i d_i; with `normalize` divided by sum_i w_i (arXiv 2212.04089, sec. 2)."""
    return multiply(weighted_sum(task_vectors, weights, normalize=normalize, dtype=dtype), lambda_, dtype)


def weighted_sum(
    vectors: Vectors, weights: Weights, *, normalize: bool, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """sum_i w_i x_i, divided by sum_i w_i if `normalize`."""
    result = total([multiply(x, w, dtype) for x, w in zip(vectors, weights, strict=True)], dtype)
    return divide(result, total(weights, dtype), dtype) if normalize else result
