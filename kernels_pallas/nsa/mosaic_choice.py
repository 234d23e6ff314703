"""Choice of the selection blocks with the Hopper kernel: shares of one chunk of queries at a time."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.choice import NOWHERE, Grid, candidates, prioritised
from kernels_pallas.nsa.mosaic_forward import LOG2_E, ROWS, Tuning, Visible
from kernels_pallas.nsa.mosaic_plan import FEATURES, intervals, pack_keys, plan_rows, ranges
from kernels_pallas.nsa.mosaic_scores import SCORE_ROWS, group_shares
from kernels_pallas.nsa.tiling import Places, finite, from_chunks, overlap, to_chunks

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
            rows, keys, floor, visible, ranges(visible, tile_rows, ROWS),
            heads_per_query=layout.padded_groups, scale=grid.scale, tuning=tuning,
        )  # fmt: skip
        of_tile = SCORE_ROWS // layout.padded_groups
        shares = jnp.moveaxis(shares[..., :of_tile], 3, 2)
        shares = shares.reshape(batch, kv_heads, layout.padded_length, -1)[:, :, :chunk]
        index = jnp.arange(shares.shape[-1], dtype=jnp.int32)[None, None]
        seen = (index >= first[..., None]) & (index < end[..., None])
        shares = jnp.where(seen[:, None], shares, 0.0)  # the kernel writes no more than it has to
        importance = _spread_over_blocks(grid, shares)
        importance = prioritised(importance, (oldest, newest), grid.num_init, grid.num_local)
        if importance.shape[-1] < grid.num_blocks:
            missing = grid.num_blocks - importance.shape[-1]
            importance = jnp.pad(importance, ((0, 0),) * 3 + ((0, missing),), constant_values=-np.inf)
        best, chosen = lax.top_k(importance, grid.num_blocks)  # of equals the lower index
        chosen = jnp.sort(jnp.where(best > -jnp.inf, chosen, NOWHERE), axis=-1)
        return jnp.moveaxis(jnp.where(chosen == NOWHERE, -1, chosen), 1, 2)

    chosen = lax.map(one_chunk, (to_chunks(q, chunk), to_chunks(lse, chunk), *parts))
    return jnp.moveaxis(from_chunks(chosen, length), 2, 1)


def _spread_over_blocks(grid: Grid, shares: Float[Array, "B Hkv T M"]) -> Float[Array, "B Hkv T N"]:
    """Eq. 9 in overlap form: a block's importance is the shares of the compressed blocks that it overlaps,
    each times the tokens in common, counted in strides. A few taps, added in full float32."""
    blocks = np.arange(grid.candidates)
    lowest = np.maximum(0, -(-(blocks * grid.block_size - grid.block_len + 1) // grid.stride))
    taps = (grid.block_size + grid.block_len - 2) // grid.stride + 1
    total = jnp.zeros((*shares.shape[:3], grid.candidates), shares.dtype)
    for tap in range(taps):
        index = lowest + tap
        shared = [
            overlap(i * grid.stride, grid.block_len, j * grid.block_size, grid.block_size) / grid.stride
            for i, j in zip(index.tolist(), blocks.tolist(), strict=True)
        ]
        inside = index < shares.shape[-1]
        weight = np.where(inside, shared, 0.0).astype(np.float32)
        taken = shares[..., np.where(inside, index, 0)]
        total = total + taken * jnp.asarray(weight)[None, None, None]
    return total
