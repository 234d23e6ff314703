"""Choice of the selection blocks with the Hopper kernel: shares of one chunk of queries at a time."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.choice import NOWHERE, Grid, candidates, prioritised, spread_over_blocks
from kernels_pallas.nsa.mosaic_forward import LOG2_E, ROWS, Tuning, Visible
from kernels_pallas.nsa.mosaic_plan import FEATURES, intervals, pack_keys, plan_rows, ranges
from kernels_pallas.nsa.mosaic_scores import SCORE_ROWS, group_shares
from kernels_pallas.nsa.tiling import Places, finite, from_chunks, to_chunks

CHUNK_ELEMENTS = 1 << 25
"""Shares that exist at once: 128 MiB."""


def choose_by_kernel(
    grid: Grid,
    q: Float[Array, "B T Hkv G Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T Hkv G"],
    places: Places,
    tuning: Tuning,
) -> Int[Array, "B Hkv T n"]:
    """As `choice.choose`, for at least one compressed key, bfloat16 or float16, groups of up to 64 heads."""
    batch, length, kv_heads, groups, _ = q.shape
    keys = pack_keys(k_cmp, ROWS)
    tile_rows = tuning.warpgroups * SCORE_ROWS
    queries = max(1, CHUNK_ELEMENTS // (keys.shape[0] * keys.shape[1]))
    layout = plan_rows(min(queries, length), groups, SCORE_ROWS)
    unit = tile_rows // layout.padded_groups
    layout = layout._replace(padded_length=-(-layout.length // unit) * unit)
    chunk = layout.length

    first, end = intervals(places, grid.stride, grid.block_len - 1, None)
    end = jnp.minimum(end, k_cmp.shape[1])
    oldest, newest = candidates(grid.block_size, places)
    parts = (to_chunks(x, chunk, fill=None) for x in (first, end, oldest, newest))

    def one_chunk(inputs: tuple[Array, ...]) -> Array:
        q_chunk, lse_chunk, first, end, oldest, newest = inputs
        rows = layout.pack(q_chunk, FEATURES)
        floor = layout.pack((finite(lse_chunk) * LOG2_E)[..., None])[..., 0]
        visible = Visible(layout.spread(first, 0), layout.spread(end, 0))
        shares = group_shares(
            rows,
            keys,
            floor,
            visible,
            ranges(visible, tile_rows, ROWS),
            heads_per_query=layout.padded_groups,
            scale=grid.scale,
            tuning=tuning,
        )
        of_tile = SCORE_ROWS // layout.padded_groups
        shares = jnp.moveaxis(shares[..., :of_tile], 3, 2)
        shares = shares.reshape(batch, kv_heads, layout.padded_length, -1)[:, :, :chunk]
        index = jnp.arange(shares.shape[-1], dtype=jnp.int32)[None, None]
        seen = (index >= first[..., None]) & (index < end[..., None])
        shares = jnp.where(seen[:, None], shares, 0.0)  # the kernel writes no more than it has to
        chosen = top_blocks(grid, spread_over_blocks(grid, shares), (oldest, newest))
        return jnp.moveaxis(ascending(chosen), 1, 2)

    chosen = lax.map(one_chunk, (to_chunks(q, chunk), to_chunks(lse, chunk), *parts))
    return jnp.moveaxis(from_chunks(chosen, length), 2, 1)


def top_blocks(
    grid: Grid, importance: Float[Array, "B Hkv T N"], limits: tuple[Int[Array, "B T"], Int[Array, "B T"]]
) -> Int[Array, "B Hkv T n"]:
    """As `choice.best`, in one call of top_k rather than in rounds; the best one first."""
    importance = prioritised(importance, limits, grid.num_init, grid.num_local)
    if importance.shape[-1] < grid.num_blocks:
        missing = grid.num_blocks - importance.shape[-1]
        importance = jnp.pad(importance, ((0, 0),) * 3 + ((0, missing),), constant_values=-np.inf)
    best, chosen = lax.top_k(importance, grid.num_blocks)  # of equals the lower index
    return jnp.where(best > -jnp.inf, chosen, -1)


def ascending(chosen: Int[Array, "*dims n"]) -> Int[Array, "*dims n"]:
    """Missing slots, -1, come last."""
    chosen = jnp.sort(jnp.where(chosen < 0, NOWHERE, chosen), axis=-1)
    return jnp.where(chosen == NOWHERE, -1, chosen)
