"""Norms, rotary positions and the MLP: pure functions on one layer's parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig
from jaxlab.models.modules import Params

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def norm(params: Params, x: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T D"]:
    """RMSNorm or LayerNorm over the width; statistics in float32, result in the dtype of `x`."""
    y = x.astype(jnp.float32)
    if config.norm == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    y = y * params["scale"].astype(jnp.float32)[None, None]
    if config.norm == "layer":
        y = y + params["bias"].astype(jnp.float32)[None, None]
    return y.astype(x.dtype)


def rotate(
    x: Float[Array, "B T H Dk"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T H Dk"]:
    """Rotary positions on pairs (i, i + Dk/2), the layout of Llama's Hugging Face checkpoints.

    Angles and the rotation are float32; the result has the dtype of `x`.
    """
    half = x.shape[-1] // 2
    wavelengths = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) / wavelengths[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def mlp(params: Params, x: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T D"]:
    """Gated or plain two-matrix MLP."""

    def linear(name: str, y: Array) -> Array:
        y = y @ params[name].astype(y.dtype)
        return y + params[f"{name}_bias"].astype(y.dtype)[None, None] if config.mlp_bias else y

    activation = ACTIVATIONS[config.activation]
    hidden = linear("up", x)
    hidden = activation(linear("gate", x)) * hidden if config.mlp == "gated" else activation(hidden)
    return linear("down", hidden)
