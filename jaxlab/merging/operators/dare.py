"""DARE: drop elements of the task vectors at random, rescale the rest; then add up, or elect as TIES does."""

from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxlab.errors import UserError
from jaxlab.merging.numerics import Mode, divide, multiply, rescale_l1, round_to, share_of
from jaxlab.merging.operators.averaging import weighted_sum
from jaxlab.merging.operators.declarations import (
    Densities,
    InMergekit,
    NonzeroSum,
    Scalar,
    Vectors,
    Weights,
    per_model,
)
from jaxlab.merging.operators.registry import operator
from jaxlab.merging.operators.ties import elected_sum
from jaxlab.merging.random_masks import keep_mask


def drop_and_rescale(
    task_vectors: Vectors,
    *,
    density: Densities = 1.0,
    rescale: bool = True,
    mode: Mode,
    dtype: jnp.dtype,
    key: UInt32[Array, "2"] | None = None,
    offset: int | UInt32[Array, "2"] = 0,
    masks: Sequence[Bool[Array, "..."]] | None = None,
) -> list[Float[Array, "*shape"]]:
    """Each element of d_i stays with probability density_i, by a mask of its own, and becomes
    d_i / density_i; the others become zero (arXiv 2311.03099, eq. 2 and 3). Without `rescale` what stays is
    left as it is.

    In mode mergekit the scale makes the L1 norm what it was before.

    Raises:
      UserError: neither key nor masks.
    """
    densities = per_model("density", density, len(task_vectors))
    if masks is None:
        if key is None:
            raise UserError("a random merge method needs key=jaxlab.merging.tensor_key(seed, tensor name)")
        masks = [
            keep_mask(key, x.shape, share_of(d), stream=i, offset=offset)
            for i, (x, d) in enumerate(zip(task_vectors, densities, strict=True))
        ]
    kept = [jnp.where(mask, x, 0.0) for mask, x in zip(masks, task_vectors, strict=True)]
    if not rescale:
        return kept
    if mode == "mergekit":
        # Its random numbers have no float16 on a CPU, so that the rescaling after them happens in float32.
        inner = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
        return [round_to(rescale_l1(k, x, inner), dtype) for k, x in zip(kept, task_vectors, strict=True)]
    scales = [divide(jnp.float32(1.0), share_of(d), dtype) for d in densities]
    return [multiply(k, jnp.where(jnp.isinf(s), 0.0, s), dtype) for k, s in zip(kept, scales, strict=True)]


@operator(
    "Yu et al. 2023, arXiv 2311.03099",
    prepare=drop_and_rescale,
    scope={"paper": "element", "mergekit": "tensor"},
)
def dare_linear(
    kept: Vectors,
    weights: Weights,
    *,
    normalize: Annotated[bool, NonzeroSum()] = False,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda sum_i w_i d_i of what was kept of the d_i (arXiv 2311.03099, with task arithmetic)."""
    return multiply(weighted_sum(kept, weights, normalize=normalize, dtype=dtype), lambda_, dtype)


@operator(
    "Yu et al. 2023, arXiv 2311.03099, with TIES' election",
    prepare=drop_and_rescale,
    scope={"paper": "element", "mergekit": "tensor"},
)
def dare_ties(
    kept: Vectors,
    weights: Weights,
    *,
    normalize: Annotated[bool, InMergekit(False)] = True,
    lambda_: Scalar = 1.0,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda times TIES' elected sum of what was kept of the d_i (arXiv 2311.03099, with 2306.01708)."""
    elected = elected_sum(kept, weights, normalize=normalize, mode=mode, dtype=dtype)
    return multiply(elected, lambda_, dtype)
