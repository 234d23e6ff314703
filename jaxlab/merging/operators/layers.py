"""By depth: layer swap; LiNeS, after any operator; extrapolation."""

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.errors import UserError
from jaxlab.merging.numerics import divide, multiply, round_to, total
from jaxlab.merging.operators.averaging import weighted_sum
from jaxlab.merging.operators.declarations import NonzeroSum, NotNegative, Scalar, Vectors, Weights
from jaxlab.merging.operators.registry import afterwards, operator


@operator("Bandarkar et al. 2024, arXiv 2410.01335")
def layer_swap(
    task_vectors: Vectors,
    weights: Weights,
    *,
    bottom: Annotated[int, NotNegative],
    top: Annotated[int, NotNegative] = 0,
    transition: Annotated[int, NotNegative] = 0,
    layer: int | Int[Array, ""],
    num_layers: int,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """The first model in the `bottom` first and the `top` last layers and outside of layers, the second in
    between; `transition` layers on the inner side of both borders are the mean of the two
    (arXiv 2410.01335, sec. 3.2). Each is base + w_i d_i.

    Raises:
      UserError: not two models, no layer left for the second.
    """
    if len(task_vectors) != 2:
        raise UserError(f"layer_swap takes two models, not {len(task_vectors)}")
    if bottom + top >= num_layers:
        raise UserError(
            f"layer_swap: bottom {bottom} and top {top} leave none of {num_layers} layers to the second"
        )
    layer = jnp.asarray(layer, jnp.int32)
    outer = (layer < bottom) | (layer >= num_layers - top)
    edge = ((layer < bottom + transition) & (bottom > 0)) | (
        (layer >= num_layers - top - transition) & (top > 0)
    )
    first = jnp.where(outer, 1.0, jnp.where(edge, 0.5, 0.0))
    ours, other = (multiply(d, w, dtype) for d, w in zip(task_vectors, weights, strict=True))
    mean = total([multiply(ours, 0.5, dtype), multiply(other, 0.5, dtype)], dtype)
    return jnp.where(first == 1.0, ours, jnp.where(first == 0.0, other, mean))


@afterwards("Wang et al. 2024, arXiv 2410.17146")
def lines(
    merged: Float[Array, "*shape"],
    *,
    alpha: Scalar,
    beta: Scalar,
    layer: int | Int[Array, ""],
    num_layers: int,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """The merged task vector of layer l of L times alpha + beta l / (L - 1): shallow layers change less;
    alpha outside of layers (arXiv 2410.17146, sec. 4, LiNeS).
    """
    depth = divide(
        jnp.maximum(jnp.asarray(layer), 0).astype(jnp.float32),
        jnp.float32(max(num_layers - 1, 1)),
        jnp.dtype(jnp.float32),
    )
    scale = round_to(
        jnp.asarray(alpha, jnp.float32) + multiply(depth, beta, jnp.dtype(jnp.float32)),
        jnp.dtype(jnp.float32),
    )
    return multiply(merged, scale, dtype)


@operator("Zheng et al. 2024, arXiv 2404.16792")
def expo(
    task_vectors: Vectors,
    weights: Weights,
    *,
    alpha: Scalar = 0.3,
    normalize: Annotated[bool, NonzeroSum()] = True,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """(1 + alpha) sum_i w_i d_i / sum_i w_i: beyond the model, away from the base that it was aligned from
    (arXiv 2404.16792, eq. 1; one model there). Without `normalize` undivided.
    """
    mean = weighted_sum(task_vectors, weights, normalize=normalize, dtype=dtype)
    return multiply(mean, 1.0 + jnp.asarray(alpha, jnp.float32), dtype)
