"""How Hopper kernels reach queries and keys: where the model has them, or packed beside each other.

A row is one query of one head. A group of 8, 16, 32 or 64 heads whose dims are multiples of 64 is read and
written in place, [B, T, Hkv, G, D], one query's heads at a time; keys are, [B, S, Hkv, D], if their number
is a multiple of a tile. Everything else is packed into [X, R, D] before, which moves it through device memory
once more. Axis letters as in common.py.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.hopper import FEATURES, ROWS
from kernels_pallas.nsa.mosaic_gpu.common import Saved
from kernels_pallas.nsa.mosaic_gpu.plan import Rows, pack_keys, unpack_keys

SMALLEST = 8
"""Rows of a swizzled tile: what one query must fill to be copied by itself."""


class Place(NamedTuple):
    """Where the rows of one array are: static."""

    layout: Rows
    batch: int
    kv_heads: int
    dim: int
    """As the kernels see it, padded."""
    in_place: bool

    @property
    def queries(self) -> int:
        """T, or the padded length of packed rows."""
        return self.layout.length if self.in_place else self.layout.padded_length

    @property
    def groups(self) -> int:
        return self.layout.padded_groups

    def pieces(self, rows: int) -> int:
        """Copies that bring so many rows."""
        return rows // self.groups if self.in_place else 1

    def shape(self) -> tuple[int, int, int]:
        """Of the operand or result of a kernel."""
        if self.in_place:
            return self.batch * self.queries * self.kv_heads, self.groups, self.dim
        return self.batch * self.kv_heads, self.queries * self.groups, self.dim

    def give(self, x: Float[Array, "B T Hkv G D"]) -> Array:
        """As an operand: a view where it is in place."""
        return x.reshape(self.shape()) if self.in_place else self.layout.pack(x, FEATURES)

    def take(self, x: Array, dim: int) -> Float[Array, "B T Hkv G D"]:
        """A result, padding cut off."""
        if self.in_place:
            return x.reshape(self.batch, self.queries, self.kv_heads, self.groups, self.dim)
        return self.layout.unpack(x, self.kv_heads, dim)

    def _query(self, x: Array, query: Array) -> Array:
        batch, head = lax.div(x, self.kv_heads), lax.rem(x, self.kv_heads)
        return (batch * self.queries + query) * self.kv_heads + head

    def load(self, source: Any, x: Array, start: Array, target: Any, barrier: Any) -> None:
        """Rows start ... of X into shared memory: `pieces` arrivals. Of queries that are not there it brings
        the last one; what is seen says that they see nothing."""
        rows = target.shape[0]
        if not self.in_place:
            plgpu.copy_gmem_to_smem(source.at[x, pl.ds(start, rows)], target, barrier)
            return
        first = lax.div(start, self.groups)
        for i in range(rows // self.groups):
            query = jnp.minimum(first + i, self.queries - 1)
            here = target.at[pl.ds(i * self.groups, self.groups)]
            plgpu.copy_gmem_to_smem(source.at[self._query(x, query)], here, barrier)

    def store(self, source: Any, target: Any, x: Array, start: Array) -> None:
        """Rows in shared memory to start ... of X; queries that are not there are left out."""
        rows = source.shape[0]
        if not self.in_place:
            plgpu.copy_smem_to_gmem(source, target.at[x, pl.ds(start, rows)])
            return
        first = lax.div(start, self.groups)
        for i in range(rows // self.groups):
            query = first + i

            def one(i: int = i, query: Array = query) -> None:
                here = source.at[pl.ds(i * self.groups, self.groups)]
                plgpu.copy_smem_to_gmem(here, target.at[self._query(x, query)])

            pl.when(query < self.queries)(one)


def place_of(layout: Rows, x: Array | jax.ShapeDtypeStruct) -> Place:
    """Of an array [B, T, Hkv, G, D]."""
    batch, _, kv_heads, groups, dim = x.shape
    fits = groups == layout.padded_groups and groups >= SMALLEST and ROWS % groups == 0
    padded = -(-dim // FEATURES) * FEATURES
    return Place(layout, batch, kv_heads, padded, fits and dim == padded)


def packed_rows(x: Float[Array, "X R D"]) -> Place:
    """Of an array that is packed already."""
    groups, rows, dim = x.shape
    return Place(Rows(rows, 1, 1, rows), groups, 1, dim, in_place=False)


def places_of(saved: Saved) -> tuple[Place, Place]:
    """Of queries and of the gradient of their outputs."""
    return saved.places or (packed_rows(saved.q), packed_rows(saved.d_out))


class KeyShape(NamedTuple):
    """Of keys or values as the kernels see them."""

    groups: int
    length: int
    dim: int


def give_keys(k: Float[Array, "B S Hkv Dk"], v: Float[Array, "B S Hkv Dv"], tile: int) -> tuple[Array, Array]:
    """As operands: themselves, or both as [X, S_padded, D_padded]."""
    if k.shape[1] % tile == 0 and k.shape[3] % FEATURES == 0 and v.shape[3] % FEATURES == 0:
        return k, v
    return pack_keys(k, tile), pack_keys(v, tile)


def take_keys(x: Array, like: Float[Array, "B S Hkv D"]) -> Float[Array, "B S Hkv D"]:
    """Gradients that lie as `give_keys` gave the keys."""
    return x.astype(like.dtype) if x.ndim == 4 else unpack_keys(x, like)


def key_shape(x: Array) -> KeyShape:
    if x.ndim == 3:
        return KeyShape(*x.shape)
    batch, length, kv_heads, dim = x.shape
    return KeyShape(batch * kv_heads, length, dim)


def key_slice(ref: Any, x: Array, keys: Any) -> tuple[Any, ...]:
    """Index of some keys of X."""
    if len(ref.shape) == 3:
        return x, keys
    kv_heads = ref.shape[2]
    return lax.div(x, kv_heads), keys, lax.rem(x, kv_heads)


def result_of(place: Place, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(place.shape(), dtype)
