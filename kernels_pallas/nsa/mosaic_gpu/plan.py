"""What each tile of a Hopper kernel has to read, worked out in XLA; nothing is of size queries times keys.

A row is one query of one head. The heads of a group are padded to a power of two and the queries to whole
tiles, so a tile of rows is some queries with all of their heads, and every branch is attention to an interval
of keys: for selection, to the interval's part in the selected blocks. Neighbouring queries share the union of
their blocks; each row's bit says which of them are its own. Blocks of packed texts begin anywhere, and the
tiles of keys stay where they are: such a block is the end of one tile and the beginning of the next.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import FEATURES, ROWS
from kernels_pallas.nsa.base import Positions, ceil_div, pad_axis, power_of_two_at_most, selected_rows
from kernels_pallas.nsa.mosaic_gpu.common import Inverse, Lists, Ranges, Visible

MAX_QUERIES = 32
"""In a tile, as each has a bit of an int32."""


LARGEST = np.iinfo(np.int32).max


class Rows(NamedTuple):
    """How queries become rows: static."""

    length: int
    groups: int
    padded_groups: int
    padded_length: int

    def queries(self, rows: int) -> int:
        """In a tile of so many rows."""
        return rows // self.padded_groups

    def pack(self, x: Float[Array, "B T Hkv G D"], features: int | None = None) -> Float[Array, "X R padded"]:
        """Rows of queries; the last axis is padded to a multiple of `features`."""
        x = x if features is None else pad_axis(x, 4, features)
        x = pad_axis(pad_axis(x, 3, self.padded_groups), 1, self.padded_length)
        batch, _, kv_heads, _, dim = x.shape
        return jnp.moveaxis(x, 2, 1).reshape(batch * kv_heads, self.padded_length * self.padded_groups, dim)

    def unpack(self, x: Float[Array, "X R padded"], kv_heads: int, dim: int) -> Float[Array, "B T Hkv G D"]:
        """The inverse of `pack`, padding cut off."""
        x = x.reshape(-1, kv_heads, self.padded_length, self.padded_groups, x.shape[-1])
        return jnp.moveaxis(x, 1, 2)[:, : self.length, :, : self.groups, :dim]

    def spread(self, x: Int[Array, "B T"], fill: int) -> Int[Array, "B R"]:
        """A number of each query to its rows; rows of padded queries get `fill`."""
        return jnp.repeat(pad_axis(x, 1, self.padded_length, fill=fill), self.padded_groups, axis=1)


def plan_rows(length: int, groups: int, rows: int) -> Rows:
    """Rows for tiles of `rows`; groups of up to 64 heads."""
    padded = power_of_two_at_most(2 * groups - 1)
    padded = max(padded, ceil_div(rows, MAX_QUERIES))
    queries = max(rows, ROWS) // padded
    return Rows(length, groups, padded, max(1, ceil_div(length, queries)) * queries)


def pack_keys(x: Float[Array, "B S Hkv D"], tile: int) -> Float[Array, "X S_padded D_padded"]:
    x = pad_axis(pad_axis(x, 3, FEATURES), 1, tile)
    batch, length, kv_heads, dim = x.shape
    return jnp.moveaxis(x, 2, 1).reshape(batch * kv_heads, length, dim)


def unpack_keys(
    x: Float[Array, "X S_padded D_padded"], like: Float[Array, "B S Hkv D"]
) -> Float[Array, "B S Hkv D"]:
    """The inverse of `pack_keys`, in the dtype of `like`."""
    batch, length, kv_heads, dim = like.shape
    x = x.reshape(batch, kv_heads, *x.shape[1:])
    return jnp.moveaxis(x, 1, 2)[:, :length, :, :dim].astype(like.dtype)


class TilesOfBlocks(NamedTuple):
    """The tile of ROWS keys in which each selected block begins, and the next one where the block goes on
    there; -1 for none."""

    heads: Int[Array, "B T Hkv n"]
    tails: Int[Array, "B T Hkv n"] | None
    """None: every block is a tile."""


def tiles_of_blocks(indices: Int[Array, "B T Hkv n"], positions: Positions) -> TilesOfBlocks:
    """For blocks of ROWS tokens."""
    rows = selected_rows(indices, positions, ROWS)
    heads = jnp.where(rows < 0, -1, rows // ROWS)
    if positions.key_segments is None:
        return TilesOfBlocks(heads, None)
    reaches = (heads + 1) * ROWS <= positions.q_positions[:, :, None, None]
    return TilesOfBlocks(heads, jnp.where((rows >= 0) & (rows % ROWS != 0) & reaches, heads + 1, -1))


def ranges(visible: Visible, rows: int, keys: int) -> Ranges:
    """Tiles of keys that each tile of rows reads."""
    batch = visible.first.shape[0]
    first, end = (x.reshape(batch, -1, rows) for x in visible)
    empty = end <= first
    start = jnp.min(jnp.where(empty, LARGEST, first), axis=2) // keys
    stop = ceil_div(jnp.max(jnp.where(empty, 0, end), axis=2), keys)
    start = jnp.minimum(start, stop)
    full_start = jnp.clip(ceil_div(jnp.max(first, axis=2), keys), start, stop)
    full_stop = jnp.clip(jnp.min(jnp.where(empty, 0, end), axis=2) // keys, full_start, stop)
    return Ranges(jnp.stack([start, full_start, full_stop, stop], axis=2))


def readers(plan: Ranges, tiles: int) -> Int[Array, "B tiles 2"]:
    """First and end of the tiles of rows among which are all that read each tile of keys."""
    start, stop = plan.bounds[..., 0], plan.bounds[..., 3]
    start = jnp.where(stop > start, start, LARGEST)
    key_tile = jnp.arange(tiles, dtype=jnp.int32)

    def of_row(start: Array, stop: Array) -> tuple[Array, Array]:
        # The first that stops behind the tile, and the last that starts no later: by maxima from the front
        # and minima from the back, which are in order.
        first = jnp.searchsorted(lax.cummax(stop), key_tile, side="right")
        end = jnp.searchsorted(lax.cummin(start, reverse=True), key_tile, side="right")
        return first, end

    first, end = jax.vmap(of_row)(start, stop)
    return jnp.stack([jnp.minimum(first, end), end], axis=2).astype(jnp.int32)


def lists(layout: Rows, selected: TilesOfBlocks, blocks: int, rows: int, warpgroups: int) -> Lists:
    """Union of the tiles of keys that hold the blocks which the queries of each tile selected."""
    queries = layout.queries(rows)
    of_query = jnp.asarray((np.uint32(1) << np.arange(queries, dtype=np.uint32)).view(np.int32))
    parts = [x for x in selected if x is not None]
    names, bits = [], []
    for i, part in enumerate(parts):
        part = pad_axis(part, 1, layout.padded_length, fill=-1)
        batch, length, kv_heads, slots = part.shape
        tiles = length // queries
        block = jnp.moveaxis(part, 2, 1).reshape(batch * kv_heads, tiles, queries * slots)
        names.append(jnp.where((block >= 0) & (block < blocks), block, blocks))
        bit = jnp.broadcast_to(jnp.repeat(of_query, slots)[None, None], block.shape)
        bits.append([bit if j == i else jnp.zeros_like(bit) for j in range(len(parts))])
    block = jnp.concatenate(names, axis=2)
    both = [jnp.concatenate(x, axis=2) for x in zip(*bits, strict=True)]
    # Not stable, which would cost one more operand: the order among equal blocks does not matter.
    block, *both = lax.sort((block, *both), dimension=2, num_keys=1, is_stable=False)
    new = jnp.pad(block[..., 1:] != block[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
    slot = jnp.cumsum(new.astype(jnp.int32), axis=2) - 1
    count = jnp.sum((new & (block < blocks)).astype(jnp.int32), axis=2)

    def join(slots: Array, numbers: Array, bits: list[Array]) -> tuple[Array, list[Array]]:
        # The bits of one block's queries differ, so their sum is their union; integers add in any order.
        union = [jnp.zeros_like(x).at[slots].add(x, mode="promise_in_bounds") for x in bits]
        return jnp.full_like(numbers, blocks).at[slots].min(numbers, mode="promise_in_bounds"), union

    union, members = jax.vmap(jax.vmap(join))(slot, block, both)
    row_bits = jnp.repeat(of_query, layout.padded_groups)
    of_warpgroups = jnp.sum(of_query.reshape(warpgroups, -1), axis=1)
    return Lists(count, union, members[0], row_bits, of_warpgroups, *members[1:])


def inverse(plan: Lists, blocks: int) -> Inverse:
    """The lists turned round, in ascending order of the tiles.

    Where it fits an int32 the key is block and tile in one: for a single key XLA has CUB's radix sort.
    """
    groups, tiles, slots = plan.blocks.shape
    used = jnp.arange(slots, dtype=jnp.int32)[None, None] < plan.steps[..., None]
    block = jnp.where(used, plan.blocks, blocks).reshape(groups, tiles * slots)
    tile = jnp.repeat(jnp.arange(tiles, dtype=jnp.int32), slots)[None]
    tile = jnp.broadcast_to(tile, block.shape)
    members = [x.reshape(block.shape) for x in (plan.members, plan.tails) if x is not None]
    number = jnp.arange(blocks + 1, dtype=jnp.int32)
    if (blocks + 1) * tiles <= LARGEST:
        key, *members = lax.sort((block * tiles + tile, *members), dimension=1, num_keys=1, is_stable=False)
        block, tile = key // tiles, key % tiles
    else:
        block, tile, *members = lax.sort((block, tile, *members), dimension=1, num_keys=2, is_stable=False)
    start = jax.vmap(lambda row: jnp.searchsorted(row, number))(block)
    return Inverse(start.astype(jnp.int32), tile, *members)
