"""Selection of blocks by the kernel in choice.py: what it is told of queries, and its answer put in order."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import LOG2_E, ROWS
from kernels_pallas.nsa.base import SelectionGrid, ceil_div, finite, pad_axis
from kernels_pallas.nsa.importance import ascending
from kernels_pallas.nsa.mosaic_gpu.choice import COLUMN, Choosing, Spread, choose, columns_of, rows_of
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.nsa.mosaic_gpu.plan import Rows, pack_keys, plan_rows
from kernels_pallas.nsa.mosaic_gpu.query_rows import place_of

LARGEST = np.iinfo(np.int32).max


class Texts(NamedTuple):
    """Where each query's text stands."""

    first: Int[Array, "B T"]
    """First compressed key that the query sees and the end of them; end <= first for none."""
    end: Int[Array, "B T"]
    origin: Int[Array, "B T"] | None
    """Slot of the text's first compressed key; None: 0 everywhere."""
    newest: Int[Array, "B T"]
    """The query's own block, counted from the text's start; -1 for a query that selects nothing."""


def select_on_chip(
    grid: SelectionGrid,
    spread: Spread,
    q: Float[Array, "B T Hkv G Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T Hkv G"],
    texts: Texts,
    tuning: Tuning,
    most_tiles: int | None = None,
) -> Int[Array, "B Hkv T n"]:
    """As the selection in XLA, for at least one compressed key."""
    batch, length, kv_heads, groups, _ = q.shape
    layout = plan_rows(length, groups, ROWS)
    own_rows = rows_of(layout.padded_groups)
    unit = tuning.warpgroups * own_rows // layout.padded_groups
    layout = layout._replace(padded_length=ceil_div(length, unit) * unit)
    place = place_of(layout, q)
    keys = pack_keys(k_cmp, ROWS)
    floor = layout.pack((finite(lse) * LOG2_E)[..., None])[..., 0]
    choosing = _choosing(layout, spread, texts, floor, keys.shape[1] // ROWS, tuning)
    found = choose(place.give(q), place, keys, choosing, grid, spread, tuning=tuning, most_tiles=most_tiles)
    of_tile = own_rows // layout.padded_groups
    found = jnp.moveaxis(found[:, :, : grid.num_blocks, :of_tile], 3, 2)
    found = found.reshape(batch, kv_heads, layout.padded_length, grid.num_blocks)[:, :, :length]
    return ascending(found)


def _choosing(
    layout: Rows, spread: Spread, texts: Texts, lse: Array, key_tiles: int, tuning: Tuning
) -> Choosing:
    columns, of_tile = columns_of(layout.padded_groups), rows_of(layout.padded_groups) // layout.padded_groups

    def by_tile(x: Array, fill: int) -> Array:
        """[B, T] -> [B, W, queries of a warpgroup]."""
        x = pad_axis(x, 1, layout.padded_length, fill=fill)
        return x.reshape(x.shape[0], -1, of_tile)

    packed = texts.origin is not None
    origin = by_tile(jnp.zeros_like(texts.newest) if texts.origin is None else texts.origin, 0)
    newest = by_tile(texts.newest, -1)
    shift = spread.shift(origin)
    first, end = by_tile(texts.first, 0), by_tile(texts.end, 0)
    there = newest >= 0
    of_programs = lambda x: x.reshape(x.shape[0], -1, tuning.warpgroups * of_tile)
    least = lambda x: jnp.min(of_programs(jnp.where(there, x, LARGEST)), axis=2)
    most = lambda x: jnp.max(of_programs(jnp.where(there, x, 0)), axis=2)
    # Tiles from that of the text's first key on, up to that of the query's own block or the last key it sees.
    start = least(origin // ROWS)
    stop = jnp.maximum(most(ceil_div(end, ROWS)), most((newest + shift) // spread.step + 1))
    stop = jnp.minimum(stop, key_tiles)
    start = jnp.minimum(start, stop)
    bounds = jnp.stack([start, stop, most(newest + shift + 1)], axis=2)
    rows = {"first": first, "end": end, "shift": shift, "newest": newest, "phase": origin % spread.ratio}
    table = jnp.stack([rows[name] for name in COLUMN], axis=2)
    table = pad_axis(pad_axis(table, 2, 8), 3, columns, fill=0)
    if of_tile < columns:  # columns without a query
        table = table.at[:, :, COLUMN["newest"], of_tile:].set(-1)
    phases = None
    if packed:
        bits = jnp.where(there, jnp.left_shift(1, rows["phase"]), 0)
        phases = jnp.bitwise_or.reduce(bits, axis=2)
    return Choosing(lse, bounds, table, phases)
