"""DELLA: drop elements of the task vectors at random, large ones less often than small ones."""

from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxlab.errors import UserError
from jaxlab.merging.numerics import F32, Mode, divide, multiply, rescale_l1, round_to, share_of
from jaxlab.merging.operators.averaging import weighted_sum
from jaxlab.merging.operators.declarations import (
    Bounds,
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
from jaxlab.merging.random_masks import keep_mask
from jaxlab.merging.ranks import ranks

DELLA = "Deep et al. 2024, arXiv 2406.11617"
Epsilons = Annotated[Scalar | Sequence[Scalar], PerModel(), Bounds(0.0, 1.0)]


def keep_by_rank(
    task_vectors: Vectors,
    *,
    density: Densities = 1.0,
    epsilon: Epsilons = 0.15,
    rescale: bool = True,
    mode: Mode,
    dtype: jnp.dtype,
    key: UInt32[Array, "2"] | None = None,
    offset: int | UInt32[Array, "2"] = 0,
    masks: Sequence[Bool[Array, "..."]] | None = None,
) -> list[Float[Array, "*shape"]]:
    """Each element of d_i stays with a probability p that grows with its rank by magnitude in its row, and
    becomes d_i / p; the others become zero (arXiv 2406.11617, sec. 3.1, MAGPRUNE).

    paper: with n elements in a row (the last axis) and rank 0 for the largest,
    p = density + epsilon / 2 - epsilon rank / n. mergekit: epsilon is half the width: from density - epsilon
    to density + epsilon, both reached, along the second axis; what stays is scaled to the L1 norm before; the
    bounds must lie within 0 and 1. In both, density 1 keeps all, and a row of one has p = density.

    Raises:
      UserError: neither key nor masks, or in mode mergekit density +- epsilon not within 0 and 1.
    """
    count = len(task_vectors)
    densities, epsilons = per_model("density", density, count), per_model("epsilon", epsilon, count)
    if masks is None and key is None:
        raise UserError("a random merge method needs key=jaxlab.merging.tensor_key(seed, tensor name)")
    kept = []
    for i, (x, d, e) in enumerate(zip(task_vectors, densities, epsilons, strict=True)):
        known = all(isinstance(number, float | int) for number in (d, e))
        if mode == "mergekit" and known and d < 1 and not 0 < d - e <= d + e < 1:
            raise UserError(f"density +- epsilon must lie between 0 and 1; they are {d} and {e}")
        share, width = share_of(d), share_of(e)
        chance = _chance(x, share, width, mode)
        chance = jnp.where(share >= 1, 1.0, chance)
        if masks is not None:
            mask = masks[i]
        else:
            assert key is not None
            mask = keep_mask(key, x.shape, chance, stream=i, offset=offset)
        stays = jnp.where(mask, x, 0.0)
        if not rescale:
            kept.append(stays)
        elif mode == "mergekit":
            inner = F32 if dtype == jnp.float16 else dtype  # as for dare
            kept.append(round_to(rescale_l1(stays, x, inner), dtype))
        else:
            kept.append(jnp.where(mask, divide(x, jnp.where(chance > 0, chance, 1.0), dtype), 0.0))
    return kept


def _chance(
    x: Float[Array, "*shape"], density: Float[Array, ""], epsilon: Float[Array, ""], mode: Mode
) -> Float[Array, "*shape"]:
    """The probability with which each element stays."""
    if x.size == 0 or x.ndim == 0:
        return jnp.full(x.shape, density)
    axis = min(1, x.ndim - 1) if mode == "mergekit" else x.ndim - 1
    size = x.shape[axis]
    if size == 1:
        return jnp.full(x.shape, density)
    ascending = ranks(x, axis).astype(jnp.float32)
    if mode == "mergekit":
        step = divide(2.0 * epsilon, jnp.float32(size - 1), F32)
        chance = (density - epsilon) + multiply(ascending, step, F32)
    else:
        step = divide(epsilon, jnp.float32(size), F32)
        chance = (density + 0.5 * epsilon) - multiply(jnp.float32(size - 1) - ascending, step, F32)
    return jnp.clip(round_to(chance, F32), 0.0, 1.0)


@operator(DELLA, prepare=keep_by_rank, scope={"paper": "row", "mergekit": "tensor"}, ranked=True)
def della_linear(
    kept: Vectors,
    weights: Weights,
    *,
    normalize: Annotated[bool, NonzeroSum()] = False,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda sum_i w_i d_i of what was kept of the d_i (arXiv 2406.11617, without its election)."""
    return multiply(weighted_sum(kept, weights, normalize=normalize, dtype=dtype), lambda_, dtype)


@operator(DELLA, prepare=keep_by_rank, scope={"paper": "row", "mergekit": "tensor"}, ranked=True)
def della(
    kept: Vectors,
    weights: Weights,
    *,
    normalize: bool = True,
    lambda_: Scalar = 1.0,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda times TIES' elected sum of what was kept of the d_i (arXiv 2406.11617, sec. 3: drop, elect,
    fuse).
    """
    return multiply(elected_sum(kept, weights, normalize=normalize, mode=mode, dtype=dtype), lambda_, dtype)
