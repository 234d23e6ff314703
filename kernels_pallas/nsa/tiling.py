"""How the XLA reference cuts its work into pieces, and the gathers and paddings that this takes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

# Elements of one tile of scores over all rows of the batch. On a CPU a tile should stay in the cache of a
# core; on a GPU every step of a loop costs launches, so there the tiles are larger.
CPU_TILE_ELEMENTS = 1 << 19
ACCELERATOR_TILE_ELEMENTS = 1 << 24


class Places(NamedTuple):
    """Where queries and keys stand: absolute positions of the queries, and segments when sequences are
    packed."""

    q_positions: Int[Array, "B T"]
    q_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None


class Residuals(NamedTuple):
    """What an attention's forward pass leaves to its backward pass; nothing of size queries times keys."""

    q: Array
    k: Array
    v: Array
    indices: Array | None
    """Of chosen blocks, where there are some."""
    places: Places
    out: Array
    lse: Array


def softmax_shift(saved: Residuals, d_out: Array, d_lse: Array) -> Array:
    """By what a softmax's gradient lessens the gradient of each weight: the sum of d_out * out over the head
    dim, less the gradient of the log-sum-exp, which is none for a query that saw nothing."""
    dtype = accumulator(saved.q.dtype)
    d_lse = jnp.where(saved.lse == -jnp.inf, jnp.zeros_like(d_lse), d_lse)
    return jnp.sum(d_out.astype(dtype) * saved.out.astype(dtype), axis=-1) - d_lse


def tile_elements() -> int:
    """Size of one tile of scores on the default backend."""
    return CPU_TILE_ELEMENTS if jax.default_backend() == "cpu" else ACCELERATOR_TILE_ELEMENTS


def power_of_two_at_most(x: int) -> int:
    """Largest power of two that is at most x (1 for anything smaller)."""
    return 1 << max(0, x.bit_length() - 1) if x >= 1 else 1


def query_chunk(length: int, elements_per_query: int, *, budget: int, smallest: int = 16) -> int:
    """Queries handled at once so that about `budget` elements are alive, and no more than there are."""
    size = power_of_two_at_most(max(smallest, budget // max(1, elements_per_query)))
    return min(size, length) if length else 1


def pad_axis(x: Array, axis: int, multiple: int, *, fill: int | None = 0) -> Array:
    """Pad the end of one axis with a value (None: its last one) up to a multiple."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, mode="edge") if fill is None else jnp.pad(x, widths, constant_values=fill)


def to_chunks(x: Array, size: int, *, fill: int | None = 0) -> Array:
    """[B, T, ...] -> [chunks, B, size, ...]."""
    x = pad_axis(x, 1, size, fill=fill)
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0)


def from_chunks(x: Array, length: int) -> Array:
    """[chunks, B, size, ...] -> [B, length, ...]: the inverse of `to_chunks`, padding cut off."""
    chunks, batch, size = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, chunks * size, *x.shape[3:])[:, :length]


def chunk_places(places: Places, size: int) -> Places:
    """Query side of the places in chunks; padded queries repeat the last one and are cut off later."""
    segments = None if places.q_segments is None else to_chunks(places.q_segments, size, fill=None)
    return Places(to_chunks(places.q_positions, size, fill=None), segments)


def segment_starts(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of the first token of the segment that each token belongs to."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    changed = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return lax.cummax(jnp.where(changed, index, jnp.zeros_like(index)), axis=1)


def heads_first(x: Array) -> Array:
    """[B, T, Hkv, ...] -> [B, Hkv, T, ...]."""
    return jnp.moveaxis(x, 2, 1)


def merge(x: Array, axis: int) -> Array:
    """Join an axis with the one after it.

    A score has one row per query and head of the group, and two axes in all after batch and heads: on a CPU
    XLA's loops over more axes than that are several times slower.
    """
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def split(x: Array, axis: int, inner: int) -> Array:
    """Undo `merge`, given the size of the inner axis."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // inner, inner, *x.shape[axis + 1 :])


def for_each_head(x: Array, groups: int) -> Array:
    """[..., T] -> [..., T * G], each entry once per head of the group."""
    return merge(jnp.broadcast_to(x[..., None], (*x.shape, groups)), x.ndim - 1)


def take_rows(x: Array, rows: Int[Array, "B Hkv *dims"]) -> Array:
    """x [B, Hkv, R, ...], rows [B, Hkv, ...] -> x[b, h, rows[b, h, ...]]; rows must be in range."""

    def take(values: Array, index: Array) -> Array:
        return values.at[index].get(mode="promise_in_bounds")

    return jax.vmap(jax.vmap(take))(x, rows)


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Softmax and sums run in float32, or in the input's type where that is wider."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def finite(x: Array) -> Array:
    """Replace the -inf that stands for 'nothing visible' by 0, so that differences with it are defined."""
    return jnp.where(x == -jnp.inf, jnp.zeros_like(x), x)


def where_finite(mask: Bool[Array, "..."], x: Array) -> Array:
    """x where the mask holds, else 0; also stops NaN and its gradient."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def overlap(start: int, length: int, other_start: int, other_length: int) -> int:
    """Tokens that two intervals share."""
    return max(0, min(start + length, other_start + other_length) - max(start, other_start))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def default_scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if scale is None else scale
