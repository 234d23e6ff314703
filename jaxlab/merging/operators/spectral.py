"""By singular values: TSV-M, isotropic merging; calibrated or boosted after any operator.

Tensors that are no matrices (biases, norms) are merged by the mean of their weighted task vectors, as in the
authors' code.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.merging.numerics import F32, divide, fold_sum, multiply, round_to, total
from jaxlab.merging.operators.declarations import Scalar, StaticShare, Vectors, Weights
from jaxlab.merging.operators.registry import afterwards, operator

ISO = "Marczak et al. 2025, arXiv 2502.04959"


def mean_of_weighted(vectors: Vectors, weights: Weights, dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The sum of w_i d_i over their number."""
    weighted = [multiply(d, w, dtype) for d, w in zip(vectors, weights, strict=True)]
    return divide(total(weighted, dtype), jnp.float32(len(vectors)), dtype)


def svd(x: Float[Array, "m n"]) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """U, the singular values in descending order, V^T."""
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vh


def _mean(s: Float[Array, " n"]) -> Float[Array, ""]:
    return fold_sum(s, 0) / s.size


def _orthogonal(x: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """The nearest matrix with orthonormal columns or rows (Procrustes): U V^T of its singular vectors."""
    u, _, vh = svd(x)
    return u @ vh


def task_singular_vectors(task_vectors: Vectors) -> list[Float[Array, "*shape"]]:
    """Each d_i by its share of the singular vectors, made orthogonal to those of the others
    (arXiv 2412.00081, sec. 3.3, algorithm 1): the first 1/T of each d_i = U_i S_i V_i^T are joined to
    U = [U_1 ... U_T] and V; with U' and V' the nearest orthogonal matrices, part i is U'_i S_i V'_i^T.
    """
    count = len(task_vectors)
    if task_vectors[0].ndim != 2 or 0 in task_vectors[0].shape:
        return [divide(d, jnp.float32(count), F32) for d in task_vectors]
    rank = min(task_vectors[0].shape) // count
    parts = [(u[:, :rank], s[:rank], vh[:rank]) for u, s, vh in map(svd, task_vectors)]
    left = _orthogonal(jnp.concatenate([u for u, _, _ in parts], axis=1))
    right = _orthogonal(jnp.concatenate([vh for _, _, vh in parts], axis=0))
    rows = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    return [(left[:, r] * s[None]) @ right[r] for r, (_, s, _) in zip(rows, parts, strict=True)]


@operator("Gargiulo et al. 2024, arXiv 2412.00081", prepare=task_singular_vectors, scope="matrix")
def tsv_m(
    parts: Vectors, weights: Weights, *, lambda_: Scalar = 1.0, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """lambda sum_i w_i U'_i S_i V'_i^T: the tasks' first singular vectors without interference
    (arXiv 2412.00081, algorithm 1).
    """
    weighted = [multiply(p, w, dtype) for p, w in zip(parts, weights, strict=True)]
    return multiply(total(weighted, dtype), lambda_, dtype)


@operator(ISO, scope="matrix")
def iso_c(
    task_vectors: Vectors, weights: Weights, *, lambda_: Scalar = 1.0, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """lambda mean(s) U V^T of the singular value decomposition of sum_i w_i d_i: all directions equally
    strong (arXiv 2502.04959, sec. 4.1, algorithm 1).
    """
    if task_vectors[0].ndim != 2 or task_vectors[0].size == 0:
        return multiply(mean_of_weighted(task_vectors, weights, dtype), lambda_, dtype)
    summed = total([multiply(d, w, dtype) for d, w in zip(task_vectors, weights, strict=True)], dtype)
    u, s, vh = svd(summed)
    return multiply((u * _mean(s)) @ vh, lambda_, dtype)


@operator(ISO, scope="matrix")
def iso_cts(
    task_vectors: Vectors,
    weights: Weights,
    *,
    common_space_fraction: StaticShare = 0.8,
    lambda_: Scalar = 1.0,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """Iso-C in a common and in task-specific subspaces (arXiv 2502.04959, sec. 4.2, algorithm 2): the first
    k singular vectors of sum_i w_i d_i; for each task the first (r - k) / T of its w_i d_i less the part
    within those; all joined, made orthogonal, and as strong as the mean of their singular values. k is
    floor(fraction r), raised or lowered until the tasks share the rest equally.
    """
    count, first = len(task_vectors), task_vectors[0]
    if first.ndim != 2 or first.size == 0:
        return multiply(mean_of_weighted(task_vectors, weights, dtype), lambda_, dtype)
    rank = min(first.shape)
    each = round((rank - int(rank * common_space_fraction)) / count)
    each = min(each, rank // count)
    common = rank - each * count
    vectors = [multiply(d, w, dtype) for d, w in zip(task_vectors, weights, strict=True)]
    u, s, vh = svd(total(vectors, dtype))
    u, s, vh = u[:, :common], s[:common], vh[:common]
    parts = [svd(d - u @ (u.T @ d)) for d in vectors]
    left = jnp.concatenate([*(p[0][:, :each] for p in parts), u], axis=1)
    right = jnp.concatenate([*(p[2][:each] for p in parts), vh], axis=0)
    strength = _mean(jnp.concatenate([*(p[1][:each] for p in parts), s]))
    return multiply((_orthogonal(left) * strength) @ _orthogonal(right), lambda_, dtype)


@afterwards("Li et al. 2026, arXiv 2602.05536", scope="matrix")
def svc(
    merged: Float[Array, "*shape"],
    task_vectors: Sequence[Float[Array, "*shape"]],
    *,
    calibration: Scalar = 1.0,
) -> Float[Array, "*shape"]:
    """Singular value calibration: each singular value s_r of the merged task vector U S V^T times
    T / sum_i max(alpha, s_r^i), where s_r^i = <a_r, a_r^i> / |a_r^i|^2 tells how much of task i's response
    a_r^i = u_r^T d_i the merged response a_r = u_r^T d repeats (arXiv 2602.05536, eq. 4 and 8, algorithm 1).
    `calibration` is alpha. A task without a response counts alpha. No matrix: as it is.
    """
    if merged.ndim != 2 or merged.size == 0:
        return merged
    u, s, vh = svd(merged)
    responses = [u.T @ d for d in task_vectors]
    own = s[:, None] * vh
    repeats = []
    for a in responses:
        power = fold_sum(round_to(a * a, F32), 1)
        share = fold_sum(round_to(own * a, F32), 1) / jnp.where(power > 1e-12, power, 1.0)
        repeats.append(jnp.where(power > 1e-12, jnp.maximum(share, calibration), calibration))
    factor = len(responses) / sum(repeats)
    return (u * (s * factor)[None]) @ vh


@afterwards("Skorobogat et al. 2025, arXiv 2506.16506", scope="matrix")
def subspace_boosting(
    merged: Float[Array, "*shape"],
    task_vectors: Sequence[Float[Array, "*shape"]],
    *,
    beta: Scalar = 0.01,
) -> Float[Array, "*shape"]:
    """Singular values of the merged task vector below s_k are raised to it, k the first at which
    (s_1 + ... + s_k) / sum s reaches beta (arXiv 2506.16506, subspace boosting). No matrix: as it is.
    """
    del task_vectors
    if merged.ndim != 2 or merged.size == 0:
        return merged
    u, s, vh = svd(merged)
    sums = jax.lax.associative_scan(jnp.add, s)
    reached = sums >= beta * sums[-1]
    floor = s[jnp.where(jnp.any(reached), jnp.argmax(reached), s.size - 1)]
    return (u * jnp.maximum(s, floor)[None]) @ vh
