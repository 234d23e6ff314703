"""How task vectors become one: weighted sum, sum over those that agree with an elected sign, great circle."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.merging.arithmetic import Mode, over, step, times, total

Vectors = list[Float[Array, "*shape"]]
Weights = list[Float[Array, ""]]


def weighted_sum(
    vectors: Vectors, weights: Weights, *, normalize: bool, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """sum_i w_i x_i, divided by sum_i w_i if `normalize` (model soups, arXiv 2203.05482; task arithmetic,
    2212.04089).
    """
    result = total([times(x, w, dtype) for x, w in zip(vectors, weights, strict=True)], dtype)
    return over(result, total(weights, dtype), dtype) if normalize else result


def elected_sum(
    vectors: Vectors, weights: Weights, *, normalize: bool, mode: Mode, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """TIES' sign election and disjoint merge (arXiv 2306.01708, algorithm 1).

    paper: each element's sign is that of the sum of the task vectors, weights aside; vectors of that sign
    enter with their weights, and with `normalize` are divided by the sum of those weights: for equal weights
    their mean. A sum of exactly zero elects nobody, and the element stays the base's.
    mergekit: the *weighted* vectors elect, zero elects plus, and signs are compared after weighting.
    """
    weighted = [times(x, w, dtype) for x, w in zip(vectors, weights, strict=True)]
    voters = weighted if mode == "mergekit" else vectors
    votes = total(voters, jnp.dtype(jnp.float32))
    elected = jnp.where(votes >= 0, 1.0, -1.0) if mode == "mergekit" else jnp.sign(votes)
    agree = [(jnp.sign(x) == elected) & (x != 0) for x in voters]
    # A NaN votes, spoils its own election and must not vanish from the result.
    result = total([jnp.where(a | jnp.isnan(x), x, 0.0) for a, x in zip(agree, weighted, strict=True)], dtype)
    if not normalize:
        return result
    divisor = total([jnp.where(a, w, 0.0) for a, w in zip(agree, weights, strict=True)], dtype)
    return over(result, jnp.where(divisor == 0, 1.0, divisor), dtype)


class Angle(NamedTuple):
    """Between two tensors: radians, and whether the arc is taken as a straight line."""

    radians: Float[Array, ""]
    straight: Bool[Array, ""]


def angle_between(a: Float[Array, "*shape"], b: Float[Array, "*shape"], mode: Mode) -> Angle:
    """The angle between two tensors taken as vectors.

    paper: by an arctangent that is exact for small angles too; straight where there is no one arc: parallel
    or opposed within 1e-6, or a tensor of zeros. mergekit: by the arccosine of the dot product; straight
    beyond |cos| .9995; a tensor of norm up to 1e-8 is not normalised, which leaves about a right angle.
    """
    f32 = jnp.dtype(jnp.float32)
    norm_a, norm_b = (step(jnp.sqrt(step(jnp.sum(step(x * x, f32)), f32)), f32) for x in (a, b))
    if mode == "mergekit":
        unit_a, unit_b = (over(x, jnp.where(n > 1e-8, n, 1.0), f32) for x, n in ((a, norm_a), (b, norm_b)))
        cosine = jnp.clip(step(jnp.sum(step(unit_a * unit_b, f32)), f32), -1.0, 1.0)
        return Angle(step(jnp.arccos(cosine), f32), jnp.abs(cosine) > 0.9995)
    zero = (norm_a == 0) | (norm_b == 0)
    unit_a, unit_b = (over(x, jnp.where(n == 0, 1.0, n), f32) for x, n in ((a, norm_a), (b, norm_b)))
    apart, along = (
        step(jnp.sqrt(step(jnp.sum(step(d * d, f32)), f32)), f32) for d in (unit_a - unit_b, unit_a + unit_b)
    )
    radians = step(2.0 * jnp.arctan2(apart, along), f32)
    return Angle(radians, zero | (jnp.sin(radians) < 1e-6))


def great_circle(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"], t: Float[Array, ""], angle: Angle
) -> Float[Array, "*shape"]:
    """SLERP (Shoemake 1985): the point at fraction t of the arc from a (0) to b (1), both ends exact."""
    f32 = jnp.dtype(jnp.float32)
    rest = step(1.0 - t, f32)
    sine = jnp.where(angle.straight, 1.0, jnp.sin(angle.radians))
    arc = [over(jnp.sin(times(angle.radians, part, f32)), sine, f32) for part in (rest, t)]
    weights = [jnp.where(angle.straight, line, curve) for line, curve in zip((rest, t), arc, strict=True)]
    return total([times(a, weights[0], f32), times(b, weights[1], f32)], f32)
