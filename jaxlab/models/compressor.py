"""What makes one key or value of a block's: an MLP, a linear map or the mean (compression of NSA)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig
from jaxlab.models.initializer import Initializer
from kernels_pallas.nsa import compress_blocks


class Compressor(nnx.Module):
    """phi (sec. 3.3.1): an MLP over a block's keys or values with an intra-block position embedding, one
    linear map of them, or their mean, which has no parameters."""

    def __init__(self, config: ModelConfig, dim: int, init: Initializer):
        """
        Args:
          dim: of a head's keys, or of its values.
        """
        n = config.nsa
        length, width, as_mean = n.block_len, n.compress_width, n.compress_init == "mean"
        self.block_len, self.stride, self.kind = length, n.stride, n.compress_kind
        if self.kind == "mean":
            return
        position = config.initializer_range * init.numbers((length, dim))
        if self.kind == "linear":
            weight = (length * dim) ** -0.5 * init.numbers((length, dim, dim))
            if as_mean:
                mean = linear_mean_compressor(length, dim, jnp.float32)
                position, weight = mean["position"], mean["weight"]
            self.position = nnx.Param(position, axes=("block", "head_dim"))
            self.weight = nnx.Param(weight, axes=("block", "head_dim", "compress"))
            self.bias = init.zeros((dim,), ("head_dim",))
            return
        hidden = (length * dim) ** -0.5 * init.numbers((length, dim, width))
        output = width**-0.5 * init.numbers((width, dim))
        if as_mean:
            mean = mean_compressor(length, dim, jnp.float32)
            position = mean["position"]
            hidden = jnp.concatenate([mean["hidden"], hidden[..., 2 * dim :]], axis=-1)
            output = jnp.pad(mean["output"], ((0, width - 2 * dim), (0, 0)))
        self.position = nnx.Param(position, axes=("block", "head_dim"))
        self.hidden = nnx.Param(hidden, axes=("block", "head_dim", "compress"))
        self.hidden_bias = init.zeros((width,), ("compress",))
        self.output = nnx.Param(output, axes=("compress", "head_dim"))
        self.output_bias = init.zeros((dim,), ("head_dim",))

    def __call__(
        self, x: Float[Array, "B T Hkv K"], starts: Int[Array, "B M"] | None = None
    ) -> Float[Array, "B M Hkv K"]:
        """One key or value for each block of `block_len` tokens: one every `stride` tokens, or where `starts`
        says (-1: none)."""
        params = self.cast(x.dtype)
        return compress_blocks(x, params, block_len=self.block_len, stride=self.stride, starts=starts)

    def cast(self, dtype: jax.typing.DTypeLike) -> dict[str, Array]:
        """The parameters, as `compress_blocks` takes them."""
        return {name: getattr(self, name).astype(dtype) for name in _COMPRESSOR_PARAMS[self.kind]}


_COMPRESSOR_PARAMS: dict[str, tuple[str, ...]] = {
    "mlp": ("position", "hidden", "hidden_bias", "output", "output_bias"),
    "linear": ("position", "weight", "bias"),
    "mean": (),
}


def linear_mean_compressor(block_len: int, dim: int, dtype: jax.typing.DTypeLike) -> dict[str, Array]:
    """Parameters of a linear `Compressor` with which it gives the mean of each block."""
    unit = jnp.eye(dim, dtype=dtype) / jnp.asarray(block_len, dtype)
    return {
        "position": jnp.zeros((block_len, dim), dtype),
        "weight": jnp.broadcast_to(unit[None], (block_len, dim, dim)),
        "bias": jnp.zeros((dim,), dtype),
    }


def mean_compressor(block_len: int, dim: int, dtype: jax.typing.DTypeLike) -> dict[str, Array]:
    """Parameters of an MLP's `Compressor`, of width 2 * dim, with which it gives the mean of each block, as
    silu(x) - silu(-x) = x."""
    unit = jnp.eye(dim, dtype=dtype)
    hidden = jnp.concatenate([unit, -unit], axis=1) / jnp.asarray(block_len, dtype)
    return {
        "position": jnp.zeros((block_len, dim), dtype),
        "hidden": jnp.broadcast_to(hidden[None], (block_len, dim, 2 * dim)),
        "hidden_bias": jnp.zeros((2 * dim,), dtype),
        "output": jnp.concatenate([unit, -unit], axis=0),
        "output_bias": jnp.zeros((dim,), dtype),
    }
