"""Selection of blocks for each query and GQA group: scores of compressed keys, summed in importance.py.

Scores exist for one chunk of queries at a time; nothing of size T x M or T x N is kept.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import (
    Positions,
    SelectionGrid,
    accumulator,
    ceil_div,
    finite,
    heads_first,
    intervals,
    pad_axis,
    where_finite,
)
from kernels_pallas.nsa.importance import (
    block_importance,
    newest_candidates,
    overlap_weights,
    select_by_rounds,
)
from kernels_pallas.nsa.xla.tiling import (
    from_chunks,
    merge,
    query_chunk,
    split,
    tile_elements,
    to_chunks,
)

KEY_TILE = 256


def select_blocks(
    grid: SelectionGrid,
    q: Float[Array, "B T Hkv G Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T Hkv G"],
    positions: Positions,
) -> Int[Array, "B Hkv T n"]:
    """Indices of the selected blocks in ascending order, then -1.

    Where texts are packed their blocks lie anywhere against the tiles of keys. Then the shares of a chunk's
    queries are kept for all compressed keys, and each query takes those of its text.
    """
    batch, length, kv_heads, groups, _ = q.shape
    blocks = k_cmp.shape[1]
    # Tiles of compressed keys start where a selection block starts, so every tile maps onto blocks in the
    # same way.
    unit = grid.block_size // np.gcd(grid.stride, grid.block_size)
    tile_keys = int(unit * max(1, min(KEY_TILE, blocks) // unit))
    spread = overlap_weights(grid, tile_keys)
    tile_blocks = tile_keys * grid.stride // grid.block_size
    padded_blocks = ceil_div(blocks, tile_keys) * tile_blocks + spread.shape[1]
    padded_blocks = max(padded_blocks, grid.candidates)
    packed = positions.key_segments is not None
    if blocks == 0:  # nothing to score, but the loop below needs a tile to be written for
        k_cmp = jnp.zeros((batch, tile_keys, kv_heads, q.shape[-1]), k_cmp.dtype)
    keys = pad_axis(heads_first(k_cmp), 2, tile_keys)
    dtype = accumulator(q.dtype)
    width = keys.shape[2] if packed else padded_blocks
    chunk = query_chunk(length, batch * kv_heads * max(groups * tile_keys, width), budget=tile_elements())

    def one_chunk(inputs: tuple[Array, ...]) -> Array:
        q_chunk, lse_chunk, first, end, newest = inputs
        rows, floor = merge(heads_first(q_chunk), 2), merge(heads_first(finite(lse_chunk)), 2)

        def shares_of(tile: Array) -> Array:
            index = (tile * tile_keys + jnp.arange(tile_keys, dtype=jnp.int32))[None, None]
            mask = (index >= first[..., None]) & (index < end[..., None])
            k_tile = lax.dynamic_slice_in_dim(keys, tile * tile_keys, tile_keys, axis=2)
            scores = jnp.einsum("bhrd,bhsd->bhrs", rows, k_tile, preferred_element_type=dtype)
            shares = split(jnp.exp(scores * grid.scale - floor[..., None]), 2, groups)
            # Summed over the group before the mask: one mask for all of its heads.
            return where_finite(mask[:, None], jnp.sum(shares, axis=3))

        def add_tile(tile: Array, importance: Array) -> Array:
            added = jnp.einsum("bhts,sn->bhtn", shares_of(tile), jnp.asarray(spread, dtype))
            start = tile * tile_blocks
            here_now = lax.dynamic_slice_in_dim(importance, start, spread.shape[1], axis=3)
            return lax.dynamic_update_slice_in_dim(importance, here_now + added, start, axis=3)

        def keep_tile(tile: Array, shares: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(shares, shares_of(tile), tile * tile_keys, axis=3)

        tiles = -(-jnp.max(end) // tile_keys)
        importance = jnp.zeros((batch, kv_heads, q_chunk.shape[1], width), dtype)
        importance = lax.fori_loop(
            jnp.zeros_like(tiles), tiles, keep_tile if packed else add_tile, importance
        )
        if packed:
            importance = block_importance(grid, importance, first)
        return heads_first(
            select_by_rounds(importance, newest, grid.num_blocks, grid.num_init, grid.num_local)
        )

    first, end = intervals(positions, grid.stride, grid.block_len - 1, None)
    end = jnp.minimum(end, blocks)
    of_queries = (first, end, newest_candidates(grid.block_size, positions))
    chunks = (to_chunks(x, chunk) for x in (q, lse, *of_queries))
    return heads_first(from_chunks(lax.map(one_chunk, (*chunks,)), length))
