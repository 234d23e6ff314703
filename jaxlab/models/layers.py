"""Norms and the MLP: what they hold and what they do."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig
from jaxlab.models.initializer import Initializer
from jaxlab.models.low_rank import base_of, plus_update
from jaxlab.models.mesh import on_several_devices, take_words
from jaxlab.models.taps import NO_TAP, Tap

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the last axis."""

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: Literal["rms", "layer"],
        eps: float,
        init: Initializer,
        *,
        offset: float = 0.0,
        axes: tuple[str, ...] = ("embed",),
        biased: bool = True,
    ):
        """
        Args:
          shape: of the parameters: the last axis, or also others before it.
          eps: added to the variance.
          offset: it scales by this plus its parameter (Gemma's is 1).
          axes: logical axes of the parameters.
          biased: whether LayerNorm adds a parameter.
        """
        self.eps, self.offset, self.centered = eps, offset, kind == "layer"
        self.scale = init.full(shape, axes, 1.0 - offset)
        self.bias = init.zeros(shape, axes) if self.centered and biased else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Statistics in float32, the result in the dtype of `x`."""
        along = lambda p: p.astype(jnp.float32).reshape((1,) * (x.ndim - p.ndim) + p.shape)
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * (along(self.scale) + self.offset)
        if self.bias is not None:
            y = y + along(self.bias)
        return y.astype(x.dtype)


def layer_norm(config: ModelConfig, init: Initializer) -> Norm:
    """The norm of a decoder's width: before attention, before the MLP, at the end."""
    c = config
    return Norm((c.width,), c.norm, c.norm_eps, init, offset=c.norm_offset, biased=c.norm_bias)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(x / cap); `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Embedding(nnx.Module):
    """A row of `width` numbers for each token or position."""

    def __init__(self, rows: int, width: int, axis: str, std: float, init: Initializer):
        """
        Args:
          axis: logical axis of the rows.
          std: standard deviation of initial values.
        """
        self.axis = axis
        self.table = init.normal((rows, width), (axis, "embed"), std)

    def __call__(self, index: Int[Array, "*rows"], dtype: jax.typing.DTypeLike) -> Float[Array, "*rows D"]:
        if self.axis == "vocab" and index.ndim == 2 and on_several_devices():
            return take_words(self.table.astype(dtype), index)
        return self.table.astype(dtype)[index]


class MLP(nnx.Module):
    """Gated (arXiv 2002.05202) or plain two-matrix MLP: D -> F -> D."""

    def __init__(self, config: ModelConfig, width: int, residual_scale: float, init: Initializer):
        """
        Args:
          width: hidden width F.
          residual_scale: factor on the initial output matrix.
        """
        c, std = config, config.initializer_range
        self.activation = c.activation
        gated = c.mlp == "gated"
        self.gate = init.normal((c.width, width), ("embed", "mlp"), std) if gated else None
        self.up = init.normal((c.width, width), ("embed", "mlp"), std)
        self.down = init.normal((width, c.width), ("mlp", "embed"), std * residual_scale)
        self.gate_bias = init.zeros((width,), ("mlp",)) if c.mlp_bias and gated else None
        self.up_bias = init.zeros((width,), ("mlp",)) if c.mlp_bias else None
        self.down_bias = init.zeros((c.width,), ("embed",)) if c.mlp_bias else None

    def __call__(self, x: Float[Array, "*rows D"], tap: Tap = NO_TAP) -> Float[Array, "*rows D"]:
        activation = ACTIVATIONS[self.activation]
        hidden = linear(x, self.up, self.up_bias)
        if self.gate is None:
            hidden = activation(hidden)
        else:
            hidden = activation(linear(x, self.gate, self.gate_bias)) * hidden
        return linear(tap("mlp_hidden", hidden), self.down, self.down_bias)


def project(
    x: Float[Array, "*rows_and_inputs"],
    kernel: Float[Array, "*inputs_and_outputs"],
    inputs: int = 1,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "*rows_and_outputs"]:
    """x [*rows, *inputs] times kernel [*inputs, *outputs], over so many axes of inputs: [*rows, *outputs].

    On one device as one product of two matrices: its gradient for the kernel then has one axis of rows to sum
    over, where several would be transposed first, with all that made them (on a CPU a third of a step). A
    mesh splits examples and tokens, whose axes stay apart.

    Args:
      dtype: of the result; None: as of x.
    """
    if on_several_devices():
        return jnp.tensordot(x, kernel, axes=inputs, preferred_element_type=dtype)
    rows, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    size = math.prod(kernel.shape[:inputs])
    matrices = x.reshape(math.prod(rows), size), kernel.reshape(size, math.prod(outputs))
    return jnp.matmul(*matrices, preferred_element_type=dtype).reshape(*rows, *outputs)


def linear(
    x: Float[Array, "*rows D"], kernel: nnx.Param, bias: nnx.Param | None = None
) -> Float[Array, "*rows F"]:
    """x @ kernel + bias in the dtype of `x`; kernel [D, F], bias [F]."""
    y = plus_update(project(x, base_of(kernel, x.dtype)), x, kernel)
    return y if bias is None else y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + y.shape[-1:])
