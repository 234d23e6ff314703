"""WIDEN: weights disentangled into magnitude and direction, each column merged by how much they changed."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.merging.numerics import F32, divide, exponential, fold_sum, multiply, round_to, total, tree_sum
from jaxlab.merging.operators.declarations import Scalar, Vectors, Weights
from jaxlab.merging.operators.registry import operator


@operator("Yu et al. 2024, arXiv 2408.03092", scope="tensor", inject="models")
def widen(
    models: Vectors,
    weights: Weights,
    *,
    base: Float[Array, "*shape"],
    above_average: Scalar = 1.0,
    calibration: Scalar = 1.0,
    by_row: bool = False,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """base + sum_i w_i s_i d_i with a score s_i for each column (arXiv 2408.03092, sec. 3.2, as its authors'
    code has it).

    Of each column magnitude (its norm) and direction (its unit vector) are compared with the base's:
    |m_i - m| and 1 - cos; both are ranked within the model, rank / number of columns. A score is the softmax
    of the ranks over models, but `calibration` where a rank exceeds `above_average` times the mean rank;
    s_i is the mean of the two scores. Vectors: the same scores of |d_i| itself, element by element.
    `by_row` for embeddings, whose rows are tokens.
    """
    vectors = [round_to(x - base, dtype) for x in models]
    if base.ndim != 2:
        scores = _scores([jnp.abs(d).reshape(-1) for d in vectors], above_average, calibration)
        scores = [s.reshape(base.shape) for s in scores]
    else:
        axis = 1 if by_row else 0
        start = _magnitude(base, axis)
        changes, turns = [], []
        for x in models:
            size = _magnitude(x, axis)
            product = round_to(size * start, F32)
            cosine = divide(
                fold_sum(round_to(x * base, F32), axis), jnp.where(product == 0, 1.0, product), F32
            )
            changes.append(jnp.abs(size - start))
            turns.append(1.0 - jnp.where(product == 0, 0.0, cosine))
        pair = [_scores([_rank(x) for x in each], above_average, calibration) for each in (changes, turns)]
        mean = [0.5 * (m + d) for m, d in zip(*pair, strict=True)]
        scores = [jnp.broadcast_to(jnp.expand_dims(s, axis), base.shape) for s in mean]
    terms = [
        multiply(round_to(d * s, dtype), w, dtype) for d, s, w in zip(vectors, scores, weights, strict=True)
    ]
    return round_to(base + total(terms, dtype), dtype)


def _magnitude(x: Float[Array, "m n"], axis: int) -> Float[Array, " columns"]:
    return round_to(jnp.sqrt(fold_sum(round_to(x * x, F32), axis)), F32)


def _rank(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The place of each element in ascending order, as a share of their number."""
    order = jnp.argsort(x, stable=True)
    places = jnp.zeros(x.size, jnp.int32).at[order].set(jnp.arange(x.size, dtype=jnp.int32))
    return divide(places.astype(jnp.float32), jnp.float32(max(x.size, 1)), F32)


def _scores(ranks: Vectors, above_average: Scalar, calibration: Scalar) -> list[Float[Array, " n"]]:
    powers = [exponential(r - _greatest(ranks)) for r in ranks]
    whole = total(powers, F32)
    scores = []
    for r, p in zip(ranks, powers, strict=True):
        mean = divide(tree_sum(r), jnp.float32(max(r.size, 1)), F32)
        scores.append(jnp.where(r > multiply(mean, above_average, F32), calibration, divide(p, whole, F32)))
    return scores


def _greatest(ranks: Vectors) -> Float[Array, " n"]:
    greatest = ranks[0]
    for r in ranks[1:]:
        greatest = jnp.maximum(greatest, r)
    return greatest
