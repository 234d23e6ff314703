"""How the XLA reference cuts its work into pieces, and the gathers and paddings that this takes."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels_pallas.nsa.base import pad_axis, power_of_two_at_most

# Elements of one tile of scores over all rows of the batch. On a CPU a tile should stay in the cache of a
# core; on a GPU every step of a loop costs launches, so there the tiles are larger.
CPU_TILE_ELEMENTS = 1 << 19
ACCELERATOR_TILE_ELEMENTS = 1 << 24


def tile_elements() -> int:
    """Size of one tile of scores on the default backend."""
    return CPU_TILE_ELEMENTS if jax.default_backend() == "cpu" else ACCELERATOR_TILE_ELEMENTS


def query_chunk(length: int, elements_per_query: int, *, budget: int, smallest: int = 16) -> int:
    """Queries handled at once so that about `budget` elements are alive, and no more than there are."""
    size = power_of_two_at_most(max(smallest, budget // max(1, elements_per_query)))
    return min(size, length) if length else 1


def to_chunks(x: Array, size: int, *, fill: int | None = 0) -> Array:
    """[B, T, ...] -> [chunks, B, size, ...]."""
    x = pad_axis(x, 1, size, fill=fill)
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0)


def from_chunks(x: Array, length: int) -> Array:
    """[chunks, B, size, ...] -> [B, length, ...]: the inverse of `to_chunks`, padding cut off."""
    chunks, batch, size = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, chunks * size, *x.shape[3:])[:, :length]


def merge(x: Array, axis: int) -> Array:
    """Join an axis with the one after it.

    A score has one row per query and head of the group, and two axes in all after batch and heads: on a CPU
    XLA's loops over more axes than that are several times slower.
    """
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def split(x: Array, axis: int, inner: int) -> Array:
    """Undo `merge`, given the size of the inner axis."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // inner, inner, *x.shape[axis + 1 :])


def transposed(x: Array) -> Array:
    """[..., R, D] -> [..., D, R] as the left side of a product.

    On a CPU it is written out: XLA would fold it into the product, which then takes up to twice as long.
    """
    x = jnp.swapaxes(x, -1, -2)
    return lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def for_each_head(x: Array, groups: int) -> Array:
    """[..., T] -> [..., T * G], each entry once per head of the group."""
    return merge(jnp.broadcast_to(x[..., None], (*x.shape, groups)), x.ndim - 1)


def take_rows(x: Array, rows: Int[Array, "B Hkv *dims"]) -> Array:
    """x [B, Hkv, R, ...], rows [B, Hkv, ...] -> x[b, h, rows[b, h, ...]]; rows must be in range."""

    def take(values: Array, index: Array) -> Array:
        return values.at[index].get(mode="promise_in_bounds")

    return jax.vmap(jax.vmap(take))(x, rows)
