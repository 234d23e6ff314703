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
    """Where the pairs of one chunk went: X tiles of P pairs each. Pair t * n + i is query t with slot i."""

    steps: Int[Array, ""]
    tile_block: Int[Array, "B Hkv X"]
    tile_used: Bool[Array, "B Hkv X"]
    tile_pair: Int[Array, "B Hkv X P"]
    tile_valid: Bool[Array, "B Hkv X P"]
    pair_place: Int[Array, "B Hkv T n"]
    pair_valid: Bool[Array, "B Hkv T n"]


def plan_pairs(sizes: Sizes, names: Int[Array, "B Hkv T n"], end: int, distinct: int) -> Plan:
    """Sort the pairs by block, then by query, and lay each block's pairs into tiles of their own.

    A block is named by a number below `end`, whatever it means; others are missing slots. At most `distinct`
    different ones are among `names`.
    """
    *rows, queries, selected = names.shape
    pairs = queries * selected
    valid = (names >= 0) & (names < end)
    block = jnp.where(valid, names, end).reshape(*rows, pairs)
    number = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32)[None, None], block.shape)
    if (end + 1) * pairs <= np.iinfo(np.int32).max:  # one integer for block and pair is sorted sooner
        packed = lax.sort(block * pairs + number, dimension=2, is_stable=False)
        sorted_block, order = packed // pairs, packed % pairs
    else:
        sorted_block, order = lax.sort((block, number), dimension=2, num_keys=1)
    # Blocks by their rank among those that are there, so that no table is as long as there are names.
    new = jnp.pad(sorted_block[..., 1:] != sorted_block[..., :-1], ((0, 0), (0, 0), (1, 0)))
    new = (new | (number == 0)) & (sorted_block < end)
    rank = jnp.cumsum(new.astype(jnp.int32), axis=2) - 1
    rank = jnp.where(sorted_block < end, rank, distinct)
    start = first_at_least(rank, jnp.arange(distinct + 1, dtype=jnp.int32))
    start, count = start[..., :-1], start[..., 1:] - start[..., :-1]
    rank_tiles = ceil_div(count, sizes.pairs)
    tiles_end = jnp.cumsum(rank_tiles, axis=2, dtype=jnp.int32)
    tiles_start = tiles_end - rank_tiles

    tile = jnp.arange(sizes.tiles, dtype=jnp.int32)
    tile_rank = first_at_least(tiles_end, tile + 1)
    used = tile_rank < distinct
    tile_rank = jnp.minimum(tile_rank, distinct - 1)
    before = (tile[None, None] - take_rows(tiles_start, tile_rank)) * sizes.pairs
    lane = before[..., None] + jnp.arange(sizes.pairs, dtype=jnp.int32)[None, None, None]
    tile_valid = (lane < take_rows(count, tile_rank)[..., None]) & used[..., None]
    source = jnp.where(tile_valid, lane + take_rows(start, tile_rank)[..., None], 0)
    tile_block = take_rows(sorted_block, jnp.minimum(take_rows(start, tile_rank), pairs - 1))
    tile_block = jnp.where(used, tile_block, end - 1)  # ascending to the last

    # Place p of the sorted list is moved on by the lanes that pad the tiles of the blocks before.
    place = _inverse(order)
    moved = take_rows(tiles_start * sizes.pairs - start, jnp.minimum(take_rows(rank, place), distinct - 1))
    place = jnp.where(valid, (place + moved).reshape(names.shape), 0)
    steps = ceil_div(jnp.max(tiles_end[..., -1]), sizes.step)
    return Plan(steps, tile_block, used, take_rows(order, source), tile_valid, place, valid)


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
