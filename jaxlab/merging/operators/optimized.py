"""By minimising the interference of task vectors, without data: WUDI, OptMerge; lambdas in closed form."""

import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.merging.numerics import F32, divide, dot, multiply, round_to, total
from jaxlab.merging.operators.declarations import Bounds, NotNegative, Scalar, Vectors, Weights
from jaxlab.merging.operators.registry import operator
from jaxlab.merging.operators.spectral import mean_of_weighted, svd

Moments = tuple[Array, Array]
"""Running means of the gradient and of its square, or what else an optimizer remembers."""


def adam(gradient: Array, moments: Moments, step: Array) -> tuple[Array, Moments]:
    """A step of Adam (arXiv 1412.6980, algorithm 1) of length one, and its memory; `step` counts from 1."""
    first = 0.9 * moments[0] + 0.1 * gradient
    second = 0.999 * moments[1] + 0.001 * gradient * gradient
    unbiased = [m / (1.0 - decay**step) for m, decay in ((first, 0.9), (second, 0.999))]
    return unbiased[0] / (jnp.sqrt(unbiased[1]) + 1e-8), (first, second)


def _heavy_ball(momentum: Scalar, gradient: Array, moments: Moments, step: Array) -> tuple[Array, Moments]:
    velocity = momentum * moments[0] + gradient
    return velocity, (velocity, moments[1])


def _minimise(
    start: Float[Array, "m n"],
    quadratic: Float[Array, "n n"],
    linear: Float[Array, "m n"],
    optimizer: Callable[[Array, Moments, Array], tuple[Array, Moments]],
    learning_rate: Scalar,
    steps: int,
) -> Float[Array, "m n"]:
    """`steps` of the optimizer on a loss whose gradient at x is 2 (x quadratic - linear)."""

    def step(i: Array, state: tuple[Array, Moments]) -> tuple[Array, Moments]:
        x, moments = state
        gradient = 2.0 * (x @ quadratic - linear)
        update, moments = optimizer(gradient, moments, i.astype(jnp.float32) + 1.0)
        return x - learning_rate * update, moments

    nothing = jnp.zeros_like(start)
    x, _ = jax.lax.fori_loop(0, steps, step, (start, (nothing, nothing)))
    return x


@operator("Cheng et al. 2025, arXiv 2503.08099", scope="matrix")
def wudi(
    task_vectors: Vectors,
    weights: Weights,
    *,
    steps: Annotated[int, NotNegative] = 300,
    learning_rate: Annotated[Scalar, NotNegative] = 1e-5,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda times what Adam makes of x = sum_i w_i d_i in so many steps on the loss
    sum_i |(x - w_i d_i) (w_i d_i)^T|^2 / |w_i d_i|^2: what disturbs task i must be orthogonal to it
    (arXiv 2503.08099, sec. 4, algorithm 1). No matrix: the mean of the w_i d_i.
    """
    if task_vectors[0].ndim != 2 or task_vectors[0].size == 0:
        return multiply(mean_of_weighted(task_vectors, weights, dtype), lambda_, dtype)
    vectors = [multiply(d, w, dtype) for d, w in zip(task_vectors, weights, strict=True)]
    grams = [(d.T @ d) / _power(d) for d in vectors]
    linear = total([d @ g for d, g in zip(vectors, grams, strict=True)], F32)
    found = _minimise(total(vectors, dtype), total(grams, F32), linear, adam, learning_rate, steps)
    return multiply(found, lambda_, dtype)


@operator("Wei et al. 2025, arXiv 2505.19892", scope="matrix")
def optmerge(
    task_vectors: Vectors,
    weights: Weights,
    *,
    steps: Annotated[int, NotNegative] = 300,
    learning_rate: Annotated[Scalar, NotNegative] = 1e-4,
    momentum: Annotated[Scalar, Bounds(0.0, 1.0)] = 0.9,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda times what gradient descent with momentum makes of the mean x of the w_i d_i on the loss
    sum_i |(x - P_i) (S_i V_i^T)^T|^2 / |w_i d_i|^2, where P_i = U_i S_i V_i^T is w_i d_i by the first 1/T of
    its singular values (arXiv 2505.19892, sec. 4, as its authors' code has it). No matrix: the mean.
    """
    if task_vectors[0].ndim != 2 or task_vectors[0].size == 0:
        return multiply(mean_of_weighted(task_vectors, weights, dtype), lambda_, dtype)
    vectors = [multiply(d, w, dtype) for d, w in zip(task_vectors, weights, strict=True)]
    rank = min(vectors[0].shape) // len(vectors)
    quadratic, linear = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for d in vectors:
        u, s, vh = svd(d)
        rows = s[:rank, None] * vh[:rank]
        gram = (rows.T @ rows) / _power(d)
        quadratic, linear = quadratic + gram, linear + (u[:, :rank] @ rows) @ gram
    start = mean_of_weighted(task_vectors, weights, dtype)
    optimizer = functools.partial(_heavy_ball, momentum)
    found = _minimise(start, quadratic, linear, optimizer, learning_rate, steps)
    return multiply(found, lambda_, dtype)


def _power(d: Float[Array, "m n"]) -> Float[Array, ""]:
    power = dot(d, d)
    return jnp.where(power == 0, 1.0, power)


@operator("derived here, see its docstring", scope="tensor")
def closed_form_lambda(
    task_vectors: Vectors,
    weights: Weights,
    *,
    ridge: Scalar = 1e-4,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """lambda sum_i l_i d_i, the l_i of each tensor in closed form so that every task keeps its own share: the
    projection of the merged task vector on d_i should be w_i d_i, that is
    sum_j l_j <d_j, d_i> / |d_i|^2 = w_i for all i.

    Derivation. With C_ij = <d_i, d_j> / |d_i|^2 the demand is C l = w. Models of one origin have nearly
    parallel task vectors in some layers, where C is nearly singular, so it is met in the least squares sense
    with a penalty on l: minimise |C l - w|^2 + ridge |l|^2, whence l = (C^T C + ridge 1)^-1 C^T w. Orthogonal
    task vectors get l = w / (1 + ridge), plain task arithmetic; equal ones w / n each, their mean: what tasks
    share is not counted n times. A task vector of zeros gets 0.
    """
    count = len(task_vectors)
    inner = [
        [dot(task_vectors[min(i, j)], task_vectors[max(i, j)]) for j in range(count)] for i in range(count)
    ]
    powers = [inner[i][i] for i in range(count)]
    there = jnp.stack([p > 0 for p in powers])
    matrix = jnp.stack(
        [
            jnp.stack(
                [divide(inner[i][j], jnp.where(powers[i] > 0, powers[i], 1.0), F32) for j in range(count)]
            )
            for i in range(count)
        ]
    )
    wanted = jnp.where(there, jnp.stack(list(weights)), 0.0)
    normal = matrix.T @ matrix + ridge * jnp.eye(count)
    normal = jnp.where(there[:, None] & there[None, :], normal, jnp.eye(count))
    solved = round_to(jnp.linalg.solve(normal, matrix.T @ wanted), F32)
    terms = [multiply(d, solved[i], dtype) for i, d in enumerate(task_vectors)]
    return multiply(total(terms, dtype), lambda_, dtype)
