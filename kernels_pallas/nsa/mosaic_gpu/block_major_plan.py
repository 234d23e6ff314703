"""Rows of the Hopper kernels in the order of their blocks: how the work is cut, and what each tile reads.

An entry is one query with one of its blocks (of a packed text, where a block may lie in two tiles of keys,
with its part in one tile), and has a row for each head of the group. Entries are sorted by
block, and those of one block fill tiles of rows of their own: a tile reads a single tile of keys, and a tile
of keys is read by consecutive tiles of rows. Axis letters besides those of api.py and common.py:
L slabs of heads, K chunks of queries, X the heads of one slab, C the queries of one chunk, E places of
entries, tiles filled up.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from kernels_pallas.hopper import ROWS
from kernels_pallas.nsa.base import ceil_div, pad_axis, power_of_two_at_most
from kernels_pallas.nsa.mosaic_gpu.common import Ranges, Visible
from kernels_pallas.nsa.mosaic_gpu.plan import ranges
from kernels_pallas.nsa.mosaic_gpu.target import BLOCK
from kernels_pallas.nsa.xla.query_block_pairs import Sizes, first_at_least, plan_pairs
from kernels_pallas.nsa.xla.tiling import take_rows

ROWS_AT_ONCE = 1 << 21
"""Of one slab and chunk. Backward, a row takes 1 KiB at head dims 192/128: 2 GiB."""
ROWS_PER_BLOCK = 512
"""At least on average, as half a tile of each block is padding: more rows at once where there are many."""


class Layout(NamedTuple):
    """How heads and queries are cut: static."""

    batch: int
    kv_heads: int
    length: int
    groups: int
    slots: int
    blocks: int
    tile_rows: int
    heads: int
    """Of a slab, batch times key/value heads."""
    queries: int
    """Of a chunk."""

    @property
    def padded_groups(self) -> int:
        return _padded(self.groups)

    @property
    def sizes(self) -> Sizes:
        """Of the tiles of one head's entries."""
        pairs, entries = self.tile_rows // self.padded_groups, self.queries * self.slots
        return Sizes(self.queries, pairs, 1, entries // pairs + min(self.blocks, entries))

    def cut(self, x: Shaped[Array, "B T Hkv *D"], fill: int = 0) -> Shaped[Array, "L K X C *D"]:
        """Slabs and chunks; queries that fill the last chunk up get `fill`."""
        x = jnp.moveaxis(pad_axis(x, 1, self.queries, fill=fill), 2, 1)
        x = x.reshape(-1, self.heads, x.shape[2] // self.queries, self.queries, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1)

    def cut_rows(self, x: Shaped[Array, "B T Hkv G D"], features: int = 1) -> Shaped[Array, "L K X C rows"]:
        """As `cut`, a query's heads in one row; the last axis is padded to a multiple of `features`."""
        x = pad_axis(pad_axis(x, 4, features), 3, self.padded_groups)
        return self.cut(x.reshape(*x.shape[:3], -1))

    def join_rows(self, x: Shaped[Array, "L K X C rows"], dim: int) -> Shaped[Array, "B T Hkv G D"]:
        """The inverse of `cut_rows`, padding cut off."""
        x = jnp.moveaxis(x, 1, 2).reshape(
            self.batch, self.kv_heads, -1, self.padded_groups, x.shape[-1] // self.padded_groups
        )
        return jnp.moveaxis(x, 1, 2)[:, : self.length, :, : self.groups, :dim]


def lay_out(choices: tuple[int, ...], groups: int, blocks: int, tile_rows: int) -> Layout:
    """As many heads at once as `ROWS_AT_ONCE` allows, or else as many queries of one head, for indices of
    the shape `choices` [B, T, Hkv, n]."""
    batch, length, kv_heads, slots = choices
    at_once = max(ROWS_AT_ONCE, ROWS_PER_BLOCK * blocks)
    chunks = ceil_div(length * slots * _padded(groups), at_once)
    queries = ceil_div(length, min(chunks, length))
    fit = max(1, at_once // (queries * slots * _padded(groups)))
    heads = batch * kv_heads
    slab = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)
    return Layout(batch, kv_heads, length, groups, slots, blocks, tile_rows, slab, queries)


class Sorted(NamedTuple):
    """The entries of one slab and chunk."""

    query: Int[Array, "X E"]
    """Of each place; any query where the place is padding."""
    visible: Visible
    """Of each row: its query's interval within the block; nothing for padding."""
    plan: Ranges
    readers: Int[Array, "X blocks 2"]
    """First and end of the tiles of 64 rows that read each block."""
    place: Int[Array, "X C n"]
    there: Bool[Array, "X C n"]
    """Whether the slot has a place."""


def sort_entries(
    layout: Layout,
    tiles: Int[Array, "X C n"],
    first: Int[Array, "X C n"],
    end: Int[Array, "X C n"],
) -> Sorted:
    """Of the tile of keys in each of its slots a query sees the keys first <= key < end. Slots without one of
    them are missing, as are tiles outside 0..blocks-1."""
    begin = tiles * BLOCK
    seen = jnp.maximum(begin, first) < jnp.minimum(begin + BLOCK, end)
    names = jnp.where(seen, tiles, -1)[None]
    distinct = min(layout.blocks, layout.queries * layout.slots)
    pairs = plan_pairs(layout.sizes, names, layout.blocks, distinct)
    block, valid, pair = pairs.tile_block[0], pairs.tile_valid[0], pairs.tile_pair[0]

    def rows(limit: Array) -> Array:
        return jnp.repeat(limit.reshape(limit.shape[0], -1), layout.padded_groups, axis=1)

    of_pair = lambda x: take_rows(x.reshape(1, x.shape[0], -1), pair[None])[0]
    block_start = block[..., None] * BLOCK
    stop = jnp.where(valid, jnp.minimum(of_pair(end), block_start + BLOCK), 0)
    visible = Visible(rows(jnp.maximum(of_pair(first), block_start)), rows(stop))
    used_by = jnp.where(valid[..., 0], block, layout.blocks)
    start = first_at_least(used_by[None], jnp.arange(layout.blocks + 1, dtype=jnp.int32))[0]
    start = start * (layout.tile_rows // ROWS)
    readers = jnp.stack([start[:, :-1], start[:, 1:]], axis=2)
    plan = ranges(visible, layout.tile_rows, BLOCK)
    query = (pair // layout.slots).reshape(pair.shape[0], -1)
    return Sorted(query, visible, plan, readers, pairs.pair_place[0], pairs.pair_valid[0])


def gather(x: Shaped[Array, "X C rows"], entries: Sorted, heads: int) -> Shaped[Array, "X R D"]:
    """Rows of `heads` heads of each query, in the order of the places."""
    taken = take_rows(x[None], entries.query[None])[0]
    return taken.reshape(x.shape[0], -1, x.shape[2] // heads)


def sum_over_slots(
    rows: Shaped[Array, "X R D"], entries: Sorted, weights: Shaped[Array, "X C n heads"]
) -> Shaped[Array, "X C heads D"]:
    """Weighted sum, in float32 and in the order of the slots, of the rows of each query's entries."""
    heads, dim = weights.shape[3], rows.shape[2]
    there = entries.there[..., None, None]
    rows = rows.reshape(rows.shape[0], -1, heads, dim)

    def add(slot: Array, total: Array) -> Array:
        place = lax.dynamic_index_in_dim(entries.place, slot, axis=2, keepdims=False)
        weight = lax.dynamic_index_in_dim(weights, slot, axis=2, keepdims=False)
        part = take_rows(rows[None], place[None])[0].astype(jnp.float32) * weight[..., None]
        return total + jnp.where(lax.dynamic_index_in_dim(there, slot, axis=2, keepdims=False), part, 0.0)

    total = jnp.zeros((*weights.shape[:2], heads, dim), jnp.float32)
    # Some at a time, so that the total is not written and read again for each slot.
    return lax.fori_loop(0, weights.shape[2], add, total, unroll=8)


def _padded(groups: int) -> int:
    return power_of_two_at_most(2 * groups - 1)
