"""Which parameters a decoder has: NNX modules as descriptions, split into plain dicts (parameters.py).

A module here only holds `nnx.Param(initial value, axes=logical axis names)`; the arithmetic is in decoder.py
and attention.py. Towers and projectors have their modules beside their arithmetic, in vision/.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.config import ModelConfig
from jaxlab.models.sparse_config import BRANCHES

Params = dict[str, Any]
"""A nested dict of arrays."""


class Numbers:
    """Standard normal numbers, handed out in the order in which modules ask for them; zeros if none is drawn.

    One draw serves a whole module: XLA takes about half a second to compile each draw for a CPU.
    """

    def __init__(self, drawn: Float[Array, " size"] | None = None):
        self.drawn = drawn
        self.taken = 0

    def take(self, shape: tuple[int, ...]) -> Array:
        start, self.taken = self.taken, self.taken + math.prod(shape)
        if self.drawn is None:
            return jnp.zeros(shape, jnp.float32)
        return self.drawn[start : self.taken].reshape(shape)


def normal(numbers: Numbers, shape: tuple[int, ...], axes: tuple[str, ...], scale: float) -> nnx.Param:
    return nnx.Param(scale * numbers.take(shape), axes=axes)


def zeros(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


class Norm(nnx.Module):
    """Over `size` features, of the width by default."""

    def __init__(self, config: ModelConfig, size: int | None = None, axis: str = "embed"):
        size = config.width if size is None else size
        self.scale = nnx.Param(jnp.full((size,), 1.0 - config.norm_offset, jnp.float32), axes=(axis,))
        if config.norm == "layer":
            self.bias = zeros((size,), (axis,))


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, numbers: Numbers, residual_scale: float):
        c, std = config, config.initializer_range
        own = c.attention == "nsa" and not c.nsa.shared_kv
        branch: tuple[int, ...] = (len(BRANCHES),) if own else ()
        branch_axes: tuple[str, ...] = ("branch",) if own else ()
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.query = normal(numbers, (c.width, c.num_heads, c.key_dim), ("embed", "heads", "head_dim"), std)
        self.key = normal(numbers, (*branch, c.width, c.kv_heads, c.key_dim), (*branch_axes, *kv_axes), std)
        self.value = normal(
            numbers, (*branch, c.width, c.kv_heads, c.value_dim), (*branch_axes, *kv_axes), std
        )
        self.output = normal(
            numbers, (c.num_heads, c.value_dim, c.width), ("heads", "head_dim", "embed"), std * residual_scale
        )
        if c.attention_bias:
            self.query_bias = zeros((c.num_heads, c.key_dim), ("heads", "head_dim"))
            self.key_bias = zeros((*branch, c.kv_heads, c.key_dim), (*branch_axes, "kv_heads", "head_dim"))
            self.value_bias = zeros(
                (*branch, c.kv_heads, c.value_dim), (*branch_axes, "kv_heads", "head_dim")
            )
        if c.has_output_bias:
            self.output_bias = zeros((c.width,), ("embed",))
        if c.qk_norm != "none":
            heads = (c.num_heads, c.kv_heads) if c.qk_norm == "width" else (1, 1)
            self.query_norm = Norm(c, heads[0] * c.key_dim, "head_dim")
            self.key_norm = Norm(c, heads[1] * c.key_dim, "head_dim")
        if c.attention == "nsa":
            self.compress_key = Compressor(c, c.key_dim, numbers)
            self.compress_value = Compressor(c, c.value_dim, numbers)
            self.gate = Gate(c, numbers)
            if c.nsa.selector == "auxiliary":
                shape = (c.width, c.kv_heads, c.nsa.selector_dim)
                self.selector = nnx.Dict(
                    query=normal(numbers, shape, kv_axes, std), key=normal(numbers, shape, kv_axes, std)
                )


class Compressor(nnx.Module):
    """NSA's phi: an MLP over a block's keys or values with an intra-block position embedding (sec. 3.3.1)."""

    def __init__(self, config: ModelConfig, dim: int, numbers: Numbers):
        length, width = config.nsa.block_len, config.nsa.compress_width
        position = config.initializer_range * numbers.take((length, dim))
        hidden = (length * dim) ** -0.5 * numbers.take((length, dim, width))
        output = width**-0.5 * numbers.take((width, dim))
        if config.nsa.compress_init == "mean":
            mean = averaging(length, dim, jnp.float32)
            position = mean["position"]
            hidden = jnp.concatenate([mean["hidden"], hidden[..., 2 * dim :]], axis=-1)
            output = jnp.pad(mean["output"], ((0, width - 2 * dim), (0, 0)))
        self.position = nnx.Param(position, axes=("block", "head_dim"))
        self.hidden = nnx.Param(hidden, axes=("block", "head_dim", "compress"))
        self.hidden_bias = zeros((width,), ("compress",))
        self.output = nnx.Param(output, axes=("compress", "head_dim"))
        self.output_bias = zeros((dim,), ("head_dim",))


def averaging(block_len: int, dim: int, dtype: jax.typing.DTypeLike) -> dict[str, Array]:
    """Parameters of `compress_blocks`, of width 2 * dim, with which it gives the mean of each block, as
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


class Gate(nnx.Module):
    """NSA's gates: an MLP of the layer input, a sigmoid per query head and branch (eq. 5)."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        c, width = config, config.width
        if c.nsa.gate_width:
            self.hidden = normal(numbers, (c.width, c.nsa.gate_width), ("embed", "gate"), c.initializer_range)
            width = c.nsa.gate_width
        self.output = normal(
            numbers, (width, c.num_heads, len(BRANCHES)), ("gate", "heads", "branch"), c.initializer_range
        )
        self.bias = zeros((c.num_heads, len(BRANCHES)), ("heads", "branch"))


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, numbers: Numbers, residual_scale: float, width: int):
        c, std = config, config.initializer_range
        if c.mlp == "gated":
            self.gate = normal(numbers, (c.width, width), ("embed", "mlp"), std)
        self.up = normal(numbers, (c.width, width), ("embed", "mlp"), std)
        self.down = normal(numbers, (width, c.width), ("mlp", "embed"), std * residual_scale)
        if c.mlp_bias:
            if c.mlp == "gated":
                self.gate_bias = zeros((width,), ("mlp",))
            self.up_bias = zeros((width,), ("mlp",))
            self.down_bias = zeros((c.width,), ("embed",))


class Experts(nnx.Module):
    """Routed experts, and the shared ones as one MLP."""

    def __init__(self, config: ModelConfig, numbers: Numbers, residual_scale: float):
        c, m, std = config, config.moe, config.initializer_range
        inward, outward = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.router = normal(numbers, (c.width, m.num_experts), ("embed", "experts"), std)
        self.gate = normal(numbers, (m.num_experts, c.width, m.width), inward, std)
        self.up = normal(numbers, (m.num_experts, c.width, m.width), inward, std)
        self.down = normal(numbers, (m.num_experts, m.width, c.width), outward, std * residual_scale)
        if m.shared_width:
            self.shared = MLP(c, numbers, residual_scale, m.shared_width)
        if m.shared_gate:
            self.shared_gate = normal(numbers, (c.width,), ("embed",), std)


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, numbers: Numbers, dense: bool = False):
        residual_scale = (2 * config.num_layers) ** -0.5
        self.attention_norm = Norm(config)
        self.attention = Attention(config, numbers, residual_scale)
        if not config.parallel:
            self.mlp_norm = Norm(config)
        if config.post_norms:
            self.attention_post_norm = Norm(config)
            self.mlp_post_norm = Norm(config)
        if config.moe.num_experts and not dense:
            self.moe = Experts(config, numbers, residual_scale)
        else:
            self.mlp = MLP(config, numbers, residual_scale, config.mlp_width)


class Edges(nnx.Module):
    """What stands around the layers of a decoder."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        c, std = config, config.initializer_range
        self.embedding = nnx.Dict(table=normal(numbers, (c.embedding_rows, c.width), ("vocab", "embed"), std))
        if c.position == "learned":
            self.position = nnx.Dict(
                table=normal(numbers, (c.max_length, c.width), ("position", "embed"), std)
            )
        self.final_norm = Norm(c)
        if not c.tie_embeddings:
            self.head = nnx.Dict(table=normal(numbers, (c.width, c.vocab_size), ("embed", "vocab"), std))
            if c.head_bias:
                self.head.bias = zeros((c.vocab_size,), ("vocab",))
