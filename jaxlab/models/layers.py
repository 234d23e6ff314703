"""Norms and the MLP: pure functions on one layer's parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.models.config import ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def norm(
    params: Mapping[str, Any], x: Float[Array, "*rows D"], config: ModelConfig
) -> Float[Array, "*rows D"]:
    """RMSNorm, or LayerNorm where there is a bias; statistics in float32, result in the dtype of `x`."""
    along = lambda name: params[name].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + x.shape[-1:])
    y = x.astype(jnp.float32)
    if "bias" in params:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    y = y * (along("scale") + config.norm_offset)
    if "bias" in params:
        y = y + along("bias")
    return y.astype(x.dtype)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(x / cap); `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def mlp(
    params: Mapping[str, Any], x: Float[Array, "*rows D"], config: ModelConfig
) -> Float[Array, "*rows D"]:
    """Gated or plain two-matrix MLP."""

    def linear(name: str, y: Array) -> Array:
        y = y @ params[name].astype(y.dtype)
        if not config.mlp_bias:
            return y
        return y + params[f"{name}_bias"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + y.shape[-1:])

    activation = ACTIVATIONS[config.activation]
    hidden = linear("up", x)
    hidden = activation(linear("gate", x)) * hidden if config.mlp == "gated" else activation(hidden)
    return linear("down", hidden)
