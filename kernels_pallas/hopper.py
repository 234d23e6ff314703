"""The vocabulary of Hopper kernels: tiles in shared memory, products, vectors along a tile, masks."""

import math
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jaxtyping import Array

ROWS = 64
"""Of a tile: what a warpgroup multiplies at once."""

LOG2_E = math.log2(math.e)

FEATURES = 64
"""Head dims are padded to multiples of this: a swizzled row of 128 bytes."""

_TILING: Any = plgpu.TilingTransform

_SWIZZLE: Any = plgpu.SwizzleTransform


def _column_lanes() -> Any:
    layout = fragments.TiledLayout(
        fragments.Tiling(((32, 8), (32, 2), (1, 2))),
        warp_dims=(-5,),
        lane_dims=(-4,),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


COLUMN_LANES: Any = _column_lanes()
"""Layout of an [m, n] tile, m % 32 == 0 == n % 8, in which a warp has pairs of columns and its lanes the
rows: a reduction over the rows needs no other warp, hence no shared memory. Of that Pallas has one piece for
all warpgroups, so two of them that reduce over the rows of `Layout.WGMMA` would overwrite each other's."""


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """Shared memory for two-byte numbers that wgmma can read; the last axis is 32 or a multiple of 64."""
    width = min(shape[-1], 64)
    return plgpu.SMEM(shape, dtype, transforms=(_TILING((8, width)), _SWIZZLE(2 * width)))


def along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Broadcast a vector that belongs to one axis of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def product(a: Any, b: Any, shape: tuple[int, ...]) -> Array:
    """a @ b, both in shared memory, in float32."""

    def run(acc: Any) -> Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))  # type: ignore[arg-type]


def add_product(acc: Array, a: Array, b: Any, through: Any, registers: bool) -> Array:
    """acc + a @ b with `a` in registers, or through a piece of shared memory (see `Tuning.registers`)."""
    if registers:
        return pl.run_state(partial(plgpu.wgmma, a=a, b=b))(plgpu.ACC.init(acc))
    through[...] = a
    plgpu.commit_smem()
    return acc + product(through, b, acc.shape)


def vector(value: float, axis: int, size: int = ROWS) -> Array:
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(axis))


def zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def visible_keys(first: Array, end: Array, tile: Array, shape: tuple[int, int], rows_axis: int) -> Array:
    """Mask of a tile of scores; `first` and `end` are vectors over the rows."""
    keys_axis = 1 - rows_axis
    index = plgpu.broadcasted_iota(jnp.int32, shape, keys_axis, layout=plgpu.Layout.WGMMA)
    index = index + tile * shape[keys_axis]
    return (index >= along(first, shape, rows_axis)) & (index < along(end, shape, rows_axis))
