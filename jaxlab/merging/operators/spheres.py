"""Means and arcs on the sphere, for several models or rows: NuSLERP, multi-SLERP, the Karcher mean."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.errors import UserError
from jaxlab.merging.numerics import F32, Mode, divide, fold_sum, multiply, round_to, total, tree_sum
from jaxlab.merging.operators.declarations import (
    AtLeastOne,
    NonzeroSum,
    NotNegative,
    Scalar,
    Vectors,
    Weights,
)
from jaxlab.merging.operators.registry import operator


@operator(
    "Shoemake 1985, by rows, of weights; mergekit's", scope="tensor", inject="models", exact_weights=True
)
def nuslerp(
    models: Vectors,
    weights: Weights,
    *,
    base: Float[Array, "*shape"] | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """The point at t = w_2 / (w_1 + w_2) of the arc between two tensors, or with a base between their task
    vectors; t = 1/2 where the weights sum to less than 1e-6. Without `nuslerp_flatten` the last axis (with
    `nuslerp_row_wise` the first one) holds vectors that have an arc each (Shoemake 1985, sec. 3.3).

    A straight line where there is no one arc. paper: parallel or opposed within 1e-6, the angle by an
    arctangent; mergekit: a cosine of 1 or -1, the angle by an arccosine.

    Raises:
      UserError: not two models.
    """
    if len(models) != 2:
        raise UserError(f"nuslerp merges two models, not {len(models)}")
    vectors = [x if base is None else round_to(x - base, dtype) for x in models]
    reach = total(weights, F32)
    some = jnp.abs(reach) >= 1e-6
    t = jnp.where(some, divide(weights[1], jnp.where(some, reach, 1.0), F32), 0.5)
    shape = vectors[0].shape
    flat = nuslerp_flatten or len(shape) == 0
    a, b = (x.reshape(-1) if flat else x for x in vectors)
    axis = 0 if flat or nuslerp_row_wise else len(shape) - 1
    merged = _arc(a, b, t, axis, mode, dtype).reshape(shape)
    return merged if base is None else round_to(base + merged, dtype)


def _arc(
    a: Float[Array, "*shape"],
    b: Float[Array, "*shape"],
    t: Float[Array, ""],
    axis: int,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    norms = [jnp.maximum(_norms(x, axis, dtype), 1e-8) for x in (a, b)]
    u, v = (divide(x, n, dtype) for x, n in zip((a, b), norms, strict=True))
    if mode == "mergekit":
        cosine = jnp.clip(_sums(round_to(u * v, dtype), axis, dtype), -1.0, 1.0)
        angle = round_to(jnp.arccos(cosine), dtype)
        straight = jnp.abs(cosine) >= 1.0
    else:
        angle = 2.0 * jnp.arctan2(_norms(u - v, axis, dtype), _norms(u + v, axis, dtype))
        angle = round_to(jnp.where((norms[0] <= 1e-8) | (norms[1] <= 1e-8), jnp.pi / 2, angle), dtype)
        straight = jnp.sin(angle) < 1e-6
    sine = round_to(jnp.sin(angle), dtype)
    parts = (1.0 - t, t)
    curves = [round_to(jnp.sin(multiply(angle, part, dtype)), dtype) for part in parts]
    shares = [jnp.where(straight, line, curve) for line, curve in zip(parts, curves, strict=True)]
    summed = total([round_to(x * s, dtype) for x, s in zip((a, b), shares, strict=True)], dtype)
    return divide(summed, jnp.where(straight, 1.0, sine), dtype)


def _sums(x: Float[Array, "*shape"], axis: int, dtype: jnp.dtype) -> Float[Array, "*kept"]:
    summed = tree_sum(x)[None] if x.ndim == 1 else jnp.expand_dims(fold_sum(x, axis), axis)
    return round_to(summed, dtype)


def _norms(x: Float[Array, "*shape"], axis: int, dtype: jnp.dtype) -> Float[Array, "*kept"]:
    return round_to(jnp.sqrt(_sums(round_to(x * x, F32), axis, F32)), dtype)


@operator("Goddard 2024, mergekit's multi-SLERP", scope="tensor", inject="models")
def multislerp(
    models: Vectors,
    weights: Weights,
    *,
    base: Float[Array, "*shape"] | None = None,
    normalize_weights: Annotated[bool, NonzeroSum()] = True,
    eps: Scalar = 1e-8,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """A barycentre on the sphere: the directions u_i of the models, or with a base of their task vectors, are
    projected onto the plane that touches the sphere at m = sum w_i u_i / |sum w_i u_i|, averaged there,
    v = sum w_i (u_i - (u_i m) m), and taken back along the arc: (cos |v| m + sin |v| v / |v|) sum w_i |x_i|.

    Where the directions cancel out (|sum w_i u_i| < eps) it is sum w_i x_i; mergekit does so for two models
    and refuses more.
    """
    vectors = [(x if base is None else round_to(x - base, dtype)).reshape(-1) for x in models]
    whole = total(weights, dtype)
    shares = [divide(w, whole, dtype) if normalize_weights else w for w in weights]
    norms = [round_to(jnp.sqrt(tree_sum(x, of=jnp.square)), dtype) for x in vectors]
    lengths = [jnp.where(n == 0, 1.0, round_to(n + eps, dtype)) for n in norms]
    units = [divide(x, n, dtype) for x, n in zip(vectors, lengths, strict=True)]
    mean = _weighted(units, shares, dtype)
    reach = round_to(jnp.sqrt(tree_sum(mean, of=jnp.square)), dtype)
    cancels = reach < eps
    mean = divide(mean, jnp.where(cancels, 1.0, reach), dtype)
    dots = [round_to(tree_sum(u, mean, of=lambda a, b: round_to(a * b, dtype)), dtype) for u in units]
    tangents = [round_to(u - multiply(mean, d, dtype), dtype) for u, d in zip(units, dots, strict=True)]
    tangent = _weighted(tangents, shares, dtype)
    length = round_to(jnp.sqrt(tree_sum(tangent, of=jnp.square)), dtype)
    along = divide(
        multiply(tangent, round_to(jnp.sin(length), dtype), dtype), jnp.maximum(length, eps), dtype
    )
    point = total([multiply(mean, round_to(jnp.cos(length), dtype), dtype), along], dtype)
    point = jnp.where(length > eps, point, mean)
    scale = total([multiply(n, w, dtype) for n, w in zip(norms, shares, strict=True)], dtype)
    merged = jnp.where(cancels, _weighted(vectors, shares, dtype), multiply(point, scale, dtype))
    merged = merged.reshape(models[0].shape)
    return merged if base is None else round_to(base + merged, dtype)


def _weighted(vectors: Vectors, weights: Weights, dtype: jnp.dtype) -> Float[Array, "*shape"]:
    return total([multiply(x, w, dtype) for x, w in zip(vectors, weights, strict=True)], dtype)


@operator("Karcher 1977; for models arXiv 2603.04972", scope="tensor")
def karcher(
    models: Vectors,
    *,
    max_iter: Annotated[int, AtLeastOne] = 10,
    tol: Annotated[Scalar, NotNegative] = 1e-5,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """The Karcher mean of the models' directions, times the mean of their norms: from the mean of the
    directions u at most `max_iter` steps along v = 1/n sum theta_i / sin theta_i (u_i - cos theta_i u),
    u <- cos |v| u + sin |v| v / |v|, until |v| < tol (Karcher 1977).

    A tensor of zeros has no direction, but its norm counts. Where directions cancel out it starts from the
    first.
    """
    flat = [x.reshape(-1) for x in models]
    length = lambda x: round_to(jnp.sqrt(tree_sum(x, of=jnp.square)), dtype)
    norms = [length(x) for x in flat]
    there = [n > 0 for n in norms]
    units = [divide(x, jnp.where(ok, n, 1.0), dtype) for x, n, ok in zip(flat, norms, there, strict=True)]
    directions = sum(ok.astype(jnp.float32) for ok in there)
    share = round_to(1.0 / jnp.maximum(directions, 1.0), F32)
    first = units[-1]
    for u, ok in zip(units[-2::-1], there[-2::-1], strict=True):
        first = jnp.where(ok, u, first)
    to_unit = lambda x: divide(x, jnp.where(length(x) == 0, 1.0, length(x)), dtype)
    mean = multiply(total(units, dtype), share, dtype)
    start = jnp.where(length(mean) < tol, first, to_unit(mean))

    def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        u, done = state
        terms = []
        for x, ok in zip(units, there, strict=True):
            cosine = jnp.clip(
                round_to(tree_sum(x, u, of=lambda a, b: round_to(a * b, dtype)), dtype), -1.0, 1.0
            )
            theta = round_to(jnp.arccos(cosine), F32)
            sine = round_to(jnp.sin(theta), F32)
            factor = multiply(divide(theta, jnp.where(sine == 0, 1.0, sine), F32), share, F32)
            away = round_to(x - multiply(u, cosine, dtype), dtype)
            terms.append(jnp.where(ok & (theta >= tol), multiply(away, factor, dtype), 0.0))
        v = total(terms, dtype)
        far = length(v)
        done = done | (far < tol)
        unit = divide(v, jnp.where(far == 0, 1.0, far), dtype)
        sine, cosine = round_to(jnp.sin(far), F32), round_to(jnp.cos(far), F32)
        moved = total([multiply(u, cosine, dtype), multiply(unit, sine, dtype)], dtype)
        return jnp.where(done, u, to_unit(moved)), done

    u, _ = jax.lax.fori_loop(0, max_iter, step, (start, jnp.bool_(False)))
    radius = divide(total(norms, F32), jnp.float32(len(models)), F32)
    return multiply(u, radius, dtype).reshape(models[0].shape)
