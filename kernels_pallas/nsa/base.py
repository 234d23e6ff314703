"""What the whole package shares: records that go between its parts, arithmetic of blocks, safe numerics.

Axis letters as in api.py, and G = H / Hkv query heads of a group.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

NOWHERE = np.iinfo(np.int32).max
"""Index of an entry that is neither written nor read."""


class NsaBranches(NamedTuple):
    """Outputs of the three branches before the gates, what blocks were selected from, and which were."""

    compressed: Float[Array, "B T H Dv"]
    selected: Float[Array, "B T H Dv"]
    window: Float[Array, "B T H Dv"]
    lse: Float[Array, "B T H"]
    indices: Int[Array, "B Hkv T n"]


class GatedBranches(NamedTuple):
    """The sum of the branches times their gates, and `NsaBranches` with grouped heads."""

    out: Float[Array, "B T Hkv G Dv"]
    compressed: Float[Array, "B T Hkv G Dv"]
    selected: Float[Array, "B T Hkv G Dv"]
    window: Float[Array, "B T Hkv G Dv"]
    lse: Float[Array, "B T Hkv G"]
    indices: Int[Array, "B T Hkv n"]


class Positions(NamedTuple):
    """Where queries and keys stand: absolute positions of the queries, and segments when sequences are
    packed."""

    q_positions: Int[Array, "B T"]
    q_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None


class Interval(NamedTuple):
    """Key i stands at i * stride + offset and is seen from there on, for `window` positions (None: for
    ever)."""

    stride: int
    offset: int
    window: int | None
    scale: float


class Block(NamedTuple):
    """Static facts of selected attention."""

    size: int
    scale: float


class SelectionGrid(NamedTuple):
    """Static sizes of the selection of blocks; `kv_len` tokens make ceil(kv_len / block_size) of them."""

    block_len: int
    stride: int
    block_size: int
    num_blocks: int
    num_init: int
    num_local: int
    kv_len: int
    scale: float

    @property
    def candidates(self) -> int:
        return ceil_div(self.kv_len, self.block_size)


class Residuals(NamedTuple):
    """What an attention's forward pass leaves to its backward pass; nothing of size queries times keys."""

    q: Array
    k: Array
    v: Array
    indices: Array | None
    """Of selected blocks, where there are some."""
    positions: Positions
    out: Array
    lse: Array


def softmax_shift(saved: Residuals, d_out: Array, d_lse: Array) -> Array:
    """By what a softmax's gradient lessens the gradient of each weight: the sum of d_out * out over the head
    dim, less the gradient of the log-sum-exp, which is none for a query that saw nothing."""
    dtype = accumulator(saved.q.dtype)
    d_lse = jnp.where(saved.lse == -jnp.inf, jnp.zeros_like(d_lse), d_lse)
    return jnp.sum(d_out.astype(dtype) * saved.out.astype(dtype), axis=-1) - d_lse


def num_compressed(length: int, block_len: int, stride: int) -> int:
    """Number of complete blocks in `length` tokens."""
    return max(0, (length - block_len) // stride + 1)


def overlap(start: int, length: int, other_start: int, other_length: int) -> int:
    """Tokens that two intervals share."""
    return max(0, min(start + length, other_start + other_length) - max(start, other_start))


def ceil_div[N: (int, Array)](a: N, b: int) -> N:
    return -(-a // b)


def power_of_two_at_most(x: int) -> int:
    """Largest power of two that is at most x (1 for anything smaller)."""
    return 1 << max(0, x.bit_length() - 1) if x >= 1 else 1


def default_scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if scale is None else scale


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Softmax and sums run in float32, or in the input's type where that is wider."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def finite(x: Array) -> Array:
    """Replace the -inf that stands for 'nothing visible' by 0, so that differences with it are defined."""
    return jnp.where(x == -jnp.inf, jnp.zeros_like(x), x)


def where_finite(mask: Bool[Array, "..."], x: Array) -> Array:
    """x where the mask holds, else 0; also stops NaN and its gradient."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def pad_axis(x: Array, axis: int, multiple: int, *, fill: int | None = 0) -> Array:
    """Pad the end of one axis with a value (None: its last one) up to a multiple."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, mode="edge") if fill is None else jnp.pad(x, widths, constant_values=fill)


def heads_first(x: Array) -> Array:
    """[B, T, Hkv, ...] -> [B, Hkv, T, ...]."""
    return jnp.moveaxis(x, 2, 1)


def segment_starts(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of the first token of the segment that each token belongs to."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    changed = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return lax.cummax(jnp.where(changed, index, jnp.zeros_like(index)), axis=1)


def weigh(
    gates: Float[Array, "*heads 3"],
    compressed: Float[Array, "*heads Dv"],
    selected: Float[Array, "*heads Dv"],
    recent: Float[Array, "*heads Dv"],
) -> Float[Array, "*heads Dv"]:
    """Sum of the branches times their gates, in float32: a gate's gradient is a sum over the head dim."""
    dtype = accumulator(compressed.dtype)
    of = lambda i, x: gates[..., i, None].astype(dtype) * x.astype(dtype)
    return (of(0, compressed) + of(1, selected) + of(2, recent)).astype(compressed.dtype)
