"""By how far the models are from the base: model stock, NearSwap, Arcee Fusion; and passing through."""

import itertools
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.errors import UserError
from jaxlab.merging.numerics import (
    F32,
    Mode,
    divide,
    exponential,
    fold_sum,
    multiply,
    order_statistic,
    round_to,
    total,
    tree_sum,
)
from jaxlab.merging.operators.declarations import NotInjected, PerModel, Scalar, Vectors
from jaxlab.merging.operators.registry import operator


@operator("Jang et al. 2024, arXiv 2403.19522", scope="tensor")
def model_stock(
    models: Vectors, *, base: Float[Array, "*shape"], filter_wise: bool = False, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """t mean_i x_i + (1 - t) base with t = n c / (1 + (n - 1) c), c the mean cosine of the pairs of task
    vectors, 0 for one of zeros; t = 0 where it has no value (arXiv 2403.19522, sec. 4). With `filter_wise`
    for each row (the last axis) of its own.

    Raises:
      UserError: fewer than two models.
    """
    if len(models) < 2:
        raise UserError("model_stock needs at least two models beside the base")
    shape, by_row = base.shape, filter_wise and base.ndim > 1
    rows = [(x if by_row else x.reshape(-1)) for x in (base, *models)]
    base, models = rows[0], rows[1:]
    vectors = [round_to(x - base, dtype) for x in models]
    norms = [round_to(jnp.sqrt(_inner(d, d, by_row, F32)), dtype) for d in vectors]
    cosines = []
    for i, j in itertools.combinations(range(len(models)), 2):
        both = round_to(norms[i] * norms[j], dtype)
        inner = round_to(_inner(vectors[i], vectors[j], by_row, dtype), dtype)
        cosine = divide(inner, jnp.where(both == 0, 1.0, both), dtype)
        cosines.append(jnp.where(both == 0, 0.0, jnp.clip(cosine, -1.0, 1.0)))
    count = len(models)
    mean = divide(total(cosines, dtype), jnp.float32(len(cosines)), dtype)
    above, below = (
        round_to(count * mean, dtype),
        round_to(1.0 + round_to((count - 1) * mean, dtype), dtype),
    )
    t = jnp.where(below == 0, 0.0, divide(above, jnp.where(below == 0, 1.0, below), dtype))
    summed = models[0]
    for x in models[1:]:
        summed = round_to(summed + x, dtype)
    average = divide(summed, jnp.float32(count), dtype)
    rest = round_to(1.0 - t, dtype)
    merged = total([round_to(average * t, dtype), round_to(base * rest, dtype)], dtype)
    return merged.reshape(shape)


def _inner(x: Array, y: Array, by_row: bool, dtype: jnp.dtype) -> Float[Array, "..."]:
    if by_row:
        return fold_sum(round_to(x * y, dtype), x.ndim - 1)[..., None]
    return tree_sum(x, y, of=lambda a, b: round_to(a * b, dtype))


@operator("alchemonaut 2024, QuartetAnemoi-70B-t0.0001's NearSwap", inject="pair")
def nearswap(
    models: Vectors, *, base: Float[Array, "*shape"], t: Scalar, mode: Mode, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """w x + (1 - w) base with w = min(t / |x - base|, 1): where the model is near the base it is taken.

    Raises:
      UserError: not one model beside the base.
    """
    (x,) = _one_model("nearswap", models)
    distance = round_to(jnp.abs(x - base), dtype)
    same = distance == 0
    divisor = jnp.where(same, 1.0, distance)
    if mode == "mergekit":  # by the reciprocal
        near = multiply(divide(jnp.ones_like(x), divisor, dtype), t, dtype)
    else:
        near = divide(jnp.broadcast_to(t, x.shape), divisor, dtype)
    share = jnp.where(same, 0.0, jnp.clip(near, 0.0, 1.0))
    rest = round_to(1.0 - share, dtype)
    return total([round_to(x * share, dtype), round_to(base * rest, dtype)], dtype)


@operator("Arcee AI 2024, mergekit's Arcee Fusion", scope="tensor", inject="pair")
def arcee_fusion(
    models: Vectors, *, base: Float[Array, "*shape"], dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """The model's elements whose importance is at least median + 1.5 (third - first quartile), the base's
    elsewhere. Importance is |x - base| KL(softmax x || softmax base), rows (the last axis) as distributions,
    1e-8 added to each probability; of two middle values the lower one is the quantile.

    Raises:
      UserError: not one model beside the base.
    """
    (x,) = _one_model("arcee_fusion", models)
    if x.size == 0:
        return base
    rows = [z if z.ndim else z[None] for z in (x, base)]
    p, q = (round_to(_softmax(z, dtype) + 1e-8, dtype) for z in rows)
    terms = round_to(p * round_to(jnp.log(round_to(p / q, dtype)), dtype), dtype)
    divergence = round_to(fold_sum(terms, terms.ndim - 1), dtype)[..., None]
    change = round_to(rows[0] - rows[1], dtype)
    importance = round_to(jnp.abs(change) * divergence, dtype)
    low, middle, high = (order_statistic(importance, (x.size - 1) * i // 4) for i in (1, 2, 3))
    spread = round_to(1.5 * round_to(high - low, dtype), dtype)
    chosen = (importance >= round_to(middle + spread, dtype)) | jnp.isnan(importance)
    return base + jnp.where(chosen, change, 0.0).reshape(x.shape)


def _softmax(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    powers = exponential(x - jnp.max(x, axis=-1, keepdims=True))
    return round_to(powers / fold_sum(powers, powers.ndim - 1)[..., None], dtype)


def _one_model(name: str, models: Vectors) -> Vectors:
    if len(models) != 1:
        raise UserError(f"{name} merges a base and one model, not {len(models)}")
    return models


@operator("mergekit", inject=NotInjected("it hands one model on"))
def passthrough(
    models: Vectors, *, scale: Annotated[Any, PerModel()] = 1.0, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """scale x, of one model: for stacking layers and for scaling some.

    Raises:
      UserError: more than one model.
    """
    if len(models) != 1:
        raise UserError(f"passthrough takes one model, not {len(models)}")
    (factor,) = scale
    return multiply(models[0], jnp.asarray(factor, jnp.float32), dtype)
