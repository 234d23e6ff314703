"""Pairs of a query and a selected block, sorted by block and laid into tiles of one block each.

Both implementations of selected attention read blocks by such a plan (the kernels: in the order of blocks).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from kernels_pallas.nsa.base import ceil_div
from kernels_pallas.nsa.xla.tiling import take_rows


class Sizes(NamedTuple):
    """Queries per chunk, pairs per tile, tiles per step of the loop, tiles at most per chunk."""

    queries: int
    pairs: int
    step: int
    tiles: int


class Plan(NamedTuple):
    """Where the pairs of one chunk went: X tiles of P pairs each."""

    steps: Int[Array, ""]
    tile_block: Int[Array, "B Hkv X"]
    tile_query: Int[Array, "B Hkv X P"]
    tile_valid: Bool[Array, "B Hkv X P"]
    pair_place: Int[Array, "B Hkv T n"]
    pair_valid: Bool[Array, "B Hkv T n"]


def plan_pairs(sizes: Sizes, indices: Int[Array, "B Hkv T n"], blocks: int) -> Plan:
    """Sort the pairs by block, then by query, and lay each block's pairs into tiles of their own."""
    *rows, queries, selected = indices.shape
    pairs = queries * selected
    valid = (indices >= 0) & (indices < blocks)
    block = jnp.where(valid, indices, blocks).reshape(*rows, pairs)
    number = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32)[None, None], block.shape)
    if (blocks + 1) * pairs <= np.iinfo(np.int32).max:  # one integer for block and pair is sorted sooner
        packed = lax.sort(block * pairs + number, dimension=2, is_stable=False)
        sorted_block, order = packed // pairs, packed % pairs
    else:
        sorted_block, order = lax.sort((block, number), dimension=2, num_keys=1)
    start = first_at_least(sorted_block, jnp.arange(blocks + 1, dtype=jnp.int32))
    start, count = start[..., :-1], start[..., 1:] - start[..., :-1]
    block_tiles = ceil_div(count, sizes.pairs)
    tiles_end = jnp.cumsum(block_tiles, axis=2, dtype=jnp.int32)
    tiles_start = tiles_end - block_tiles

    tile = jnp.arange(sizes.tiles, dtype=jnp.int32)
    tile_block = first_at_least(tiles_end, tile + 1)
    used = tile_block < blocks
    tile_block = jnp.minimum(tile_block, blocks - 1)
    before = (tile[None, None] - take_rows(tiles_start, tile_block)) * sizes.pairs
    lane = before[..., None] + jnp.arange(sizes.pairs, dtype=jnp.int32)[None, None, None]
    tile_valid = (lane < take_rows(count, tile_block)[..., None]) & used[..., None]
    source = jnp.where(tile_valid, lane + take_rows(start, tile_block)[..., None], 0)

    # Place p of the sorted list is moved on by the lanes that pad the tiles of the blocks before.
    place = _inverse(order) + take_rows(tiles_start * sizes.pairs - start, jnp.minimum(block, blocks - 1))
    place = jnp.where(valid, place.reshape(indices.shape), 0)
    steps = ceil_div(jnp.max(tiles_end[..., -1]), sizes.step)
    return Plan(steps, tile_block, take_rows(order, source) // selected, tile_valid, place, valid)


def _inverse(order: Int[Array, "B Hkv E"]) -> Int[Array, "B Hkv E"]:
    """Inverse of a permutation: no index occurs twice, so the scatter is deterministic."""

    def invert(row: Array) -> Array:
        number = jnp.arange(row.shape[0], dtype=jnp.int32)
        return jnp.zeros_like(row).at[row].set(number, unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(jax.vmap(invert))(order)


def first_at_least(ascending: Int[Array, "B Hkv R"], values: Int[Array, " V"]) -> Int[Array, "B Hkv V"]:
    """Index of the first entry that is at least each value."""

    def search(row: Array) -> Array:
        return jnp.searchsorted(row, values).astype(jnp.int32)

    return jax.vmap(jax.vmap(search))(ascending)
