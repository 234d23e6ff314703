"""Selection of blocks: in one kernel (choice.py), or with that in scores.py, a chunk of queries at a time."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import FEATURES, LOG2_E, ROWS
from kernels_pallas.nsa.base import Positions, SelectionGrid, ceil_div, finite, intervals
from kernels_pallas.nsa.importance import ascending, block_importance, newest_candidates, select_by_top_k
from kernels_pallas.nsa.mosaic_gpu.choice import Spread, capacity, spread_of
from kernels_pallas.nsa.mosaic_gpu.choice_plan import Texts, select_on_chip
from kernels_pallas.nsa.mosaic_gpu.common import Tuning, Visible
from kernels_pallas.nsa.mosaic_gpu.plan import pack_keys, plan_rows, ranges
from kernels_pallas.nsa.mosaic_gpu.scores import SCORE_ROWS, group_shares
from kernels_pallas.nsa.xla.tiling import from_chunks, to_chunks

FEWEST_TILES = 16
"""Of keys between two choices: with fewer, one warpgroup a program has more shared memory for itself."""


def _on_chip(
    grid: SelectionGrid, q: Array, positions: Positions, tuning: Tuning
) -> tuple[Spread, Tuning] | None:
    spread = spread_of(grid)
    if spread is None:
        return None
    phases = 1 if positions.key_segments is None else spread.ratio
    groups, dim = plan_rows(1, q.shape[3], ROWS).padded_groups, ceil_div(q.shape[4], FEATURES) * FEATURES
    best = None
    for warpgroups in (tuning.warpgroups, 1):
        tried = dataclasses.replace(tuning, warpgroups=warpgroups)
        tiles = capacity(spread, dim, groups, tried, phases)
        if (best is None and tiles > 0) or tiles >= FEWEST_TILES:
            best = tried
        if tiles >= FEWEST_TILES:
            break
    return None if best is None else (spread, best)


CHUNK_ELEMENTS = 1 << 25
"""Shares that exist at once: 128 MiB."""


def select_blocks(
    grid: SelectionGrid,
    q: Float[Array, "B T Hkv G Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T Hkv G"],
    positions: Positions,
    tuning: Tuning,
) -> Int[Array, "B Hkv T n"]:
    """As the one in XLA, for at least one compressed key, bfloat16 or float16, groups of up to 64 heads.

    In one kernel (choice.py) where its blocks fit: they are a power of two of strides. Else
    scores by a kernel and the choice by XLA.
    """
    if (on_chip := _on_chip(grid, q, positions, tuning)) is not None:
        spread, tuning = on_chip
        first, end = intervals(positions, grid.stride, grid.block_len - 1, None)
        origin = None if positions.key_segments is None else first
        newest = newest_candidates(grid.block_size, positions)
        texts = Texts(first, jnp.minimum(end, k_cmp.shape[1]), origin, newest)
        return select_on_chip(grid, spread, q, k_cmp, lse, texts, tuning)
    batch, length, kv_heads, groups, _ = q.shape
    keys = pack_keys(k_cmp, ROWS)
    tile_rows = tuning.warpgroups * SCORE_ROWS
    queries = max(1, CHUNK_ELEMENTS // (keys.shape[0] * keys.shape[1]))
    layout = plan_rows(min(queries, length), groups, SCORE_ROWS)
    unit = tile_rows // layout.padded_groups
    layout = layout._replace(padded_length=-(-layout.length // unit) * unit)
    chunk = layout.length

    first, end = intervals(positions, grid.stride, grid.block_len - 1, None)
    end = jnp.minimum(end, k_cmp.shape[1])
    newest = newest_candidates(grid.block_size, positions)
    parts = (to_chunks(x, chunk, fill=None) for x in (first, end, newest))
    packed = positions.key_segments is not None

    def one_chunk(inputs: tuple[Array, ...]) -> Array:
        q_chunk, lse_chunk, first, end, newest = inputs
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
        importance = block_importance(grid, shares, first if packed else None)
        selected = select_by_top_k(grid, importance, newest)
        return jnp.moveaxis(ascending(selected), 1, 2)

    selected = lax.map(one_chunk, (to_chunks(q, chunk), to_chunks(lse, chunk), *parts))
    return jnp.moveaxis(from_chunks(selected, length), 2, 1)
