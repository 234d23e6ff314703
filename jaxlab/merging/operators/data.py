"""With statistics of data: Fisher merging, RegMean and RegMean++, AdaMerging; and what measures or learns
them.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.errors import UserError
from jaxlab.merging.numerics import F32, divide, multiply, round_to, total
from jaxlab.merging.operators.averaging import weighted_sum
from jaxlab.merging.operators.declarations import Bounds, NotNegative, Scalar, Vectors, Weights
from jaxlab.merging.operators.optimized import Moments, adam
from jaxlab.merging.operators.registry import operator


def _one_for_each(name: str, statistics: Any, count: int, what: str) -> list[Any]:
    if statistics is None or len(statistics) != count:
        found = "none" if statistics is None else len(statistics)
        raise UserError(f"{name} needs statistics=, {what} for each of {count} models; found {found}")
    return list(statistics)


@operator("Matena & Raffel 2022, arXiv 2111.09832")
def fisher(
    task_vectors: Vectors,
    weights: Weights,
    *,
    minimum: Annotated[Scalar, NotNegative] = 1e-6,
    statistics: Any,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """sum_i w_i F_i d_i / sum_i w_i F_i, element by element, which added to the base is the Fisher-weighted
    mean of the models (arXiv 2111.09832, eq. 3). `minimum` is added to each F_i.

    `statistics`: for each model the diagonal of its Fisher information, of the tensor's shape: the mean over
    examples of the squared gradient of log p(y | x), y drawn from or summed over p.

    Raises:
      UserError: no statistics.
    """
    matrices = _one_for_each("fisher", statistics, len(task_vectors), "the Fisher diagonal")
    shares = [
        multiply(jnp.asarray(f, jnp.float32) + minimum, w, F32)
        for f, w in zip(matrices, weights, strict=True)
    ]
    terms = [round_to(d * s, dtype) for d, s in zip(task_vectors, shares, strict=True)]
    divisor = total(shares, F32)
    return divide(total(terms, dtype), jnp.where(divisor == 0, 1.0, divisor), dtype)


def _regression_mean(
    task_vectors: Vectors, weights: Weights, reduction: Scalar, ridge: Scalar, statistics: Any, name: str
) -> Float[Array, "*shape"]:
    grams = _one_for_each(name, statistics, len(task_vectors), "the Gram matrix of its inputs, or None")
    mean = weighted_sum(task_vectors, weights, normalize=True, dtype=F32)
    if task_vectors[0].ndim != 2 or any(g is None for g in grams) or mean.size == 0:
        return mean
    size = mean.shape[1]
    diagonal = jnp.eye(size)
    kept = [
        w * jnp.asarray(g, jnp.float32) * (reduction + (1.0 - reduction) * diagonal)
        for g, w in zip(grams, weights, strict=True)
    ]
    whole = sum(kept[1:], kept[0])
    damped = whole + ridge * jnp.trace(whole) / size * diagonal
    # From the mean on, so that directions which no input has keep it.
    away = sum(
        ((d - mean) @ g for d, g in zip(task_vectors[1:], kept[1:], strict=True)),
        (task_vectors[0] - mean) @ kept[0],
    )
    return mean + jnp.linalg.solve(damped, away.T).T


@operator("Jin et al. 2022, arXiv 2212.09849", scope="matrix")
def regmean(
    task_vectors: Vectors,
    weights: Weights,
    *,
    reduction: Annotated[Scalar, Bounds(0.0, 1.0)] = 0.9,
    ridge: Annotated[Scalar, NotNegative] = 1e-6,
    statistics: Any,
) -> Float[Array, "*shape"]:
    """The linear map nearest to all models' on their own inputs: W = (sum_i W_i G_i) (sum_i G_i)^-1 with the
    Gram matrices G_i = w_i X_i^T X_i, whose elements off the diagonal are first multiplied by `reduction`
    (arXiv 2212.09849, eq. 2 and sec. 3.3); W is [out, in] as in a checkpoint. Tensors without a Gram matrix
    get the mean. `ridge`, times the mean of the diagonal, is added to the sum that is inverted, for
    directions that no input has.

    `statistics`: for each model the Gram matrix [in, in] of the inputs of this layer in that model, a sum or
    a mean over its tokens; or None.

    Raises:
      UserError: no statistics.
    """
    return _regression_mean(task_vectors, weights, reduction, ridge, statistics, "regmean")


@operator("Nguyen et al. 2025, arXiv 2508.03121", scope="matrix")
def regmean_plusplus(
    task_vectors: Vectors,
    weights: Weights,
    *,
    reduction: Annotated[Scalar, Bounds(0.0, 1.0)] = 0.9,
    ridge: Annotated[Scalar, NotNegative] = 1e-6,
    statistics: Any,
) -> Float[Array, "*shape"]:
    """RegMean, formula and all, whose Gram matrices are of what a layer's input is after the *merged* layers
    before it: layers are merged in their order (arXiv 2508.03121).

    `statistics`: as for `regmean`, measured in the model merged so far.

    Raises:
      UserError: no statistics.
    """
    return _regression_mean(task_vectors, weights, reduction, ridge, statistics, "regmean_plusplus")


@operator("Yang et al. 2023, arXiv 2310.02575")
def adamerging(
    task_vectors: Vectors, weights: Weights, *, statistics: Any, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """sum_i l_i w_i d_i with coefficients l_i learned by `learn_coefficients` on `entropy`
    (arXiv 2310.02575, sec. 3.2: one for each task, or for each task and layer).

    `statistics`: the l_i of this tensor, float32[models].

    Raises:
      UserError: no statistics.
    """
    learned = _one_for_each("adamerging", statistics, len(task_vectors), "the learned coefficient")
    terms = [
        multiply(d, round_to(w * jnp.asarray(c, jnp.float32), F32), dtype)
        for d, w, c in zip(task_vectors, weights, learned, strict=True)
    ]
    return total(terms, dtype)


def entropy(logits: Float[Array, "... classes"]) -> Float[Array, ""]:
    """The mean entropy of predictions, what AdaMerging minimises on unlabelled data (arXiv 2310.02575,
    eq. 5).
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def learn_coefficients(
    loss: Callable[[Float[Array, "..."]], Float[Array, ""]],
    start: Sequence[Any],
    *,
    steps: int = 500,
    learning_rate: float = 1e-3,
) -> Float[Array, "..."]:
    """Coefficients by Adam (arXiv 2310.02575, sec. 3.2: from 0.3 on).

    Args:
      loss: of the coefficients, for example the entropy of the merged model's predictions.
      start: where to start from: a number for each task, or a list over layers for each.
      steps, learning_rate: of Adam.
    """
    first = jnp.stack([jnp.asarray(x, jnp.float32) for x in start])

    def step(i: Array, state: tuple[Array, Moments]) -> tuple[Array, Moments]:
        found, moments = state
        update, moments = adam(jax.grad(loss)(found), moments, i.astype(jnp.float32) + 1.0)
        return found - learning_rate * update, moments

    nothing = jnp.zeros_like(first)
    found, _ = jax.lax.fori_loop(0, steps, step, (first, (nothing, nothing)))
    return found
