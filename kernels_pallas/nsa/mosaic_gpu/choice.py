"""Kernel for Hopper that selects blocks: scores, Eq. 9 and 10 and the best n, none of which leaves the chip.

A warpgroup has 128 rows, which are a few queries (columns of its tiles) with all of their heads. For each
tile of 64 compressed keys it makes their softmax weights, adds up the heads (a product with zeros and ones)
and spreads the sums over the selection blocks that they overlap (a product with the overlaps), whose
importance is kept in shared memory for as many tiles as fit. Then n rounds take the best each: the largest
importance below the last one's, the lowest index among equals. What was taken goes on into the next tiles,
so shared memory does not limit the length. Axis letters as in common.py; W warpgroups of all programs,
C columns.

Numbers enter the two small products as two of bfloat16 each, together exact to 2^-16.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import COLUMN_LANES, LOG2_E, ROWS, along, product, swizzled, vector, visible_keys
from kernels_pallas.nsa.base import SelectionGrid, overlap
from kernels_pallas.nsa.mosaic_gpu.common import Channel, Tuning, by_rows, ring, serve
from kernels_pallas.nsa.mosaic_gpu.query_rows import Place

COLUMNS = 8
"""At least: the smallest N of wgmma."""
SHARED_BYTES = 232448 - 6144
"""For everything but barriers and what reductions reserve."""
FORCED, ABOVE, NO_CANDIDATE, NOTHING = 1e38, 2e38, -1.0, 1 << 30
"""Importance of blocks that are always selected, more than that, and of those that cannot be selected; an
index behind all."""


class Spread(NamedTuple):
    """How the 64 compressed keys of a tile lie on selection blocks, static: `block_size` is `ratio` strides.

    A text's first compressed key is in slot `origin`; its phase is origin % ratio. Key `slot` belongs in row
    (slot - phase) // ratio + 1 of importance, which is block row - 1 - origin // ratio of the text; tile t
    has the rows from t * 64 / ratio on."""

    ratio: int
    rows: int
    """That one tile reaches, of 64."""

    @property
    def step(self) -> int:
        """Rows between neighbouring tiles."""
        return ROWS // self.ratio

    def shift(self, origin: Array) -> Array:
        """Row of the first block of a text."""
        return origin // self.ratio + 1


def spread_of(grid: SelectionGrid) -> Spread | None:
    """None: blocks that the kernel cannot do."""
    ratio, left = divmod(grid.block_size, grid.stride)
    if left or ratio < 1 or ROWS % ratio:
        return None
    rows = ROWS // ratio + 1 + -(-max(0, grid.block_len - grid.stride) // grid.block_size)
    return Spread(ratio, rows) if rows + 2 <= ROWS and grid.num_blocks <= ROWS else None


def overlaps(grid: SelectionGrid, spread: Spread, phases: int) -> np.ndarray:
    """float32 [phases, 64 rows, 64 keys]: tokens that a key shares with a block; small whole numbers."""
    found = np.zeros((phases, ROWS, ROWS), np.float32)
    for phase in range(phases):
        for row in range(ROWS):
            for key in range(ROWS):
                # Relative to the block of row 1, which begins with the key in slot `phase`.
                start, block = (key - phase) * grid.stride, (row - 1) * grid.block_size
                found[phase, row, key] = overlap(start, grid.block_len, block, grid.block_size)
    return found


class Choosing(NamedTuple):
    """Operands besides queries and keys."""

    lse: Float[Array, "X R"]
    """In base 2, 0 for rows that see nothing."""
    bounds: Int[Array, "B P 3"]
    """Of each program: first tile of keys, end of the tiles, end of the rows of importance."""
    columns: Int[Array, "B W 8 C"]
    """Of each warpgroup's queries what `COLUMN` says."""
    phases: Int[Array, "B W"] | None
    """Bits of the phases that occur among the columns; None: only phase 0."""


COLUMN = {
    "first": 0,  # the first key that the query sees,
    "end": 1,  # and the end of them
    "shift": 2,  # row of importance of the text's first block
    "newest": 3,  # the query's own block in its text; -1 for a query that selects nothing
    "phase": 4,
}
"""Rows of `Choosing.columns`."""


def rows_of(heads_per_query: int) -> int:
    """Of a warpgroup: 8 queries with 16 heads; at most 16 queries, whose columns registers can hold."""
    return 2 * ROWS if heads_per_query >= 8 else ROWS


def columns_of(heads_per_query: int) -> int:
    """Of a warpgroup, those beyond its queries included."""
    return max(COLUMNS, rows_of(heads_per_query) // heads_per_query)


def capacity(spread: Spread, key_dim: int, heads_per_query: int, tuning: Tuning, phases: int) -> int:
    """Tiles of keys after which the best are taken, so that importance fits into shared memory; 0: none."""
    wgs, columns, rows = tuning.warpgroups, columns_of(heads_per_query), rows_of(heads_per_query)
    each = rows * (2 * key_dim + 4) + columns * (4 * ROWS + 4 * (3 * ROWS + 9))
    if not tuning.registers:
        each += 2 * ROWS * ROWS
    common = 2 * rows * columns + 2 * ROWS * (tuning.stages * key_dim + phases * ROWS)
    rows = (SHARED_BYTES - common - wgs * each) // (4 * columns * wgs) - ROWS
    # Whole tiles of 64 rows, so that what is final ends where a tile of rows does.
    return max(0, rows // ROWS) * spread.ratio


def choose(
    q: Array,
    place: Place,
    k: Float[Array, "X M Dk"],
    choosing: Choosing,
    grid: SelectionGrid,
    spread: Spread,
    *,
    tuning: Tuning,
    most_tiles: int | None = None,
) -> Int[Array, "X W slots C"]:
    """Selected blocks of each column, by falling importance, then -1, in the first `num_blocks` slots.

    bfloat16 or float16. `q` are rows as `place` says, R a multiple of 128 * warpgroups, M and Dk of 64.
    `most_tiles` lowers `capacity`, for tests.
    """
    groups, keys, dim = k.shape
    dtype, wgs, stages = k.dtype, tuning.warpgroups, tuning.stages
    kv_heads = place.kv_heads
    rows = choosing.lse.shape[1]
    heads_per_query = place.groups
    columns, own_rows = columns_of(heads_per_query), rows_of(heads_per_query)
    tile_rows = wgs * own_rows
    square, small = (ROWS, ROWS), (ROWS, columns)
    packed = choosing.phases is not None
    phases = spread.ratio if packed else 1
    tiles_at_once = capacity(spread, dim, heads_per_query, tuning, phases)
    tiles_at_once = min(tiles_at_once, -(-(keys // ROWS) // spread.ratio) * spread.ratio)
    if most_tiles is not None:
        tiles_at_once = min(tiles_at_once, most_tiles)
    at_once = tiles_at_once * spread.step
    buffer_rows = at_once + ROWS
    count = grid.num_blocks
    slots = -(-count // 4) * 4  # copies are multiples of 128 bytes
    of_query = jnp.arange(own_rows, dtype=jnp.int32) // heads_per_query
    adding = (jnp.arange(columns, dtype=jnp.int32)[:, None] == of_query[None, :]).astype(jnp.bfloat16)
    table = jnp.asarray(overlaps(grid, spread, phases), jnp.bfloat16)
    wide, across = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)

    def nsa_choice(*all_refs):  # type: ignore[no-untyped-def]
        refs: Any = all_refs
        q_ref, k_ref, lse_ref, bounds_ref, columns_ref, *refs = refs
        phases_ref, *refs = refs if packed else (None, *refs)
        adding_ref, table_ref, out_ref, smem, barriers = refs
        q_smem, k_smem, lse_smem, adding_smem, table_smem, part_smem, *smem = smem
        column_smem, importance, value_smem, index_smem, exchange, through = smem
        ready, table_ready, k_full, k_free = barriers
        x, p, wg = lax.axis_index("x"), lax.axis_index("p"), lax.axis_index("wg")
        batch = lax.div(x, kv_heads)
        start, stop, stop_row = (bounds_ref[batch, p, i] for i in range(3))
        w = p * wgs + wg

        @pl.when(wg < wgs)
        def compute() -> None:
            plgpu.set_max_registers(232 if wgs == 2 else 240, action="increase")
            first_row = p * tile_rows + wg * own_rows
            mine = pl.ds(first_row, own_rows)
            place.load(q_ref, x, first_row, q_smem.at[wg], ready.at[wg])
            copies = [
                (lse_ref.at[x, mine], lse_smem.at[wg]),
                (columns_ref.at[batch, w], column_smem.at[wg]),
            ]
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            plgpu.barrier_wait(table_ready)
            column = lambda name: plgpu.load(column_smem.at[wg, COLUMN[name]], layout=across, optimized=False)
            read = lambda ref: plgpu.load(ref, layout=wide, optimized=False)
            tile = lambda x: plgpu.layout_cast(x, wide)
            value_smem.at[wg][...] = tile(jnp.full(small, NO_CANDIDATE, jnp.float32))
            index_smem.at[wg][...] = tile(jnp.full(small, -1, jnp.int32))

            def shares_of(slot):  # type: ignore[no-untyped-def]
                """Weights of a tile of keys, added up over the heads: [64, C]."""
                first = half_of_shares(slot, 0)
                return first if own_rows == ROWS else first + half_of_shares(slot, 1)

            def half_of_shares(slot, half):  # type: ignore[no-untyped-def]
                """Of 64 rows: those of all would take too many registers."""
                rows = pl.ds(half * ROWS, ROWS)
                scores = product(k_smem.at[slot], q_smem.at[wg, rows].transpose((1, 0)), square)
                if (half + 1) * ROWS == own_rows:
                    plgpu.barrier_arrive(k_free.at[slot])
                # Weights of keys that are seen are at most 1; of others only 0 times them must be 0, for the
                # queries beside: they go below.
                lse = plgpu.load(lse_smem.at[wg, rows], layout=across)
                scores = scores * (grid.scale * LOG2_E) - along(lse, square, 1)
                weights = jnp.exp2(jnp.minimum(scores, 1.0))
                coarse = weights.astype(jnp.bfloat16)
                fine = (weights - coarse.astype(jnp.float32)).astype(jnp.bfloat16)
                add_up = adding_smem.at[:, rows].transpose((1, 0))
                if tuning.registers:

                    def both(acc):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(acc, coarse, add_up)
                        plgpu.wgmma(acc, fine, add_up)
                        return acc[...]

                    return pl.run_scoped(both, plgpu.ACC(small, jnp.float32))
                parts = []
                for part in (coarse, fine):
                    through.at[wg][...] = part
                    plgpu.commit_smem()
                    parts.append(product(through.at[wg], add_up, small))
                return parts[0] + parts[1]

            def spread_out(shares, which):  # type: ignore[no-untyped-def]
                """Eq. 9 for the rows of importance that a tile of keys reaches: [64, C]."""
                coarse = shares.astype(jnp.bfloat16)
                fine = (shares - coarse.astype(jnp.float32)).astype(jnp.bfloat16)
                plgpu.commit_smem()  # every warp is through with the product that read them last
                part_smem.at[wg, 0].transpose((1, 0))[...] = coarse
                part_smem.at[wg, 1].transpose((1, 0))[...] = fine
                plgpu.commit_smem()

                def both(acc):  # type: ignore[no-untyped-def]
                    for i in range(2):
                        plgpu.wgmma(acc, table_smem.at[which], part_smem.at[wg, i].transpose((1, 0)))
                    return acc[...]

                return pl.run_scoped(both, plgpu.ACC(small, jnp.float32))

            def add_tile(step, base):  # type: ignore[no-untyped-def]
                slot = lax.rem(step - start, stages)
                plgpu.barrier_wait(k_full.at[slot])
                seen = visible_keys(column("first"), column("end"), step, small, 1)
                shares = jnp.where(seen, shares_of(slot), 0.0)
                if packed:
                    phase = column("phase")
                    present = phases_ref[batch, w]

                    def one_phase(which, total):  # type: ignore[no-untyped-def]
                        of_phase = jnp.where(along(phase, small, 1) == which, shares, 0.0)
                        more = lambda total: total + spread_out(of_phase, which)
                        return lax.cond((present & (1 << which)) != 0, more, lambda total: total, total)

                    total = lax.fori_loop(0, phases, one_phase, tile(jnp.zeros(small, jnp.float32)))
                else:
                    total = spread_out(shares, 0)
                here = importance.at[wg, pl.ds((step - base) * spread.step, ROWS)]
                row = plgpu.broadcasted_iota(jnp.int32, small, 0, layout=wide)
                begun = (row < ROWS - spread.step) & (step > start)  # by the tile before
                here[...] = total + jnp.where(begun, read(here), 0.0)

            def best(x, lowest):  # type: ignore[no-untyped-def]
                """Largest number of each column over its 64 rows, or the lowest, through shared memory into
                a layout that needs no other warp for that."""
                exchange.at[wg, pl.ds(0, ROWS)][...] = x
                plgpu.commit_smem()
                part = plgpu.load(exchange.at[wg, pl.ds(0, ROWS)], layout=COLUMN_LANES, optimized=False)
                exchange.at[wg, ROWS][...] = part.min(axis=0) if lowest else part.max(axis=0)
                plgpu.commit_smem()
                return plgpu.load(exchange.at[wg, ROWS], layout=across, optimized=False)

            def select(base, last):  # type: ignore[no-untyped-def]
                """The best of what was carried on and of the rows of importance from `base` on."""
                shift, newest = column("shift"), column("newest")
                row0 = base * spread.step
                final = jnp.where(last, jnp.minimum(stop_row - row0, buffer_rows), at_once)
                tiles = lax.div(final + (ROWS - 1), ROWS)
                written = (jnp.maximum(start, base) - base) * spread.step
                unwritten = (jnp.minimum(stop, base + tiles_at_once) - 1 - base) * spread.step + ROWS
                unwritten = jnp.where(stop > start, unwritten, 0)
                row = plgpu.broadcasted_iota(jnp.int32, small, 0, layout=wide)

                def index_of(tile):  # type: ignore[no-untyped-def]
                    return (row + tile * ROWS + row0 - along(shift, small, 1)).astype(jnp.float32)

                @pl.loop(0, tiles)
                def prepare(tile) -> None:  # type: ignore[no-untyped-def]
                    here = importance.at[wg, pl.ds(tile * ROWS, ROWS)]
                    at = row + tile * ROWS
                    index = at + row0 - along(shift, small, 1)
                    value = jnp.where((at >= written) & (at < unwritten), read(here), 0.0)
                    forced = (index < grid.num_init) | (index > along(newest, small, 1) - grid.num_local)
                    value = jnp.where(forced, FORCED, value)
                    candidate = (index >= 0) & (index <= along(newest, small, 1)) & (at < final)
                    here[...] = jnp.where(candidate, value, NO_CANDIDATE)

                old_value, old_index = read(value_smem.at[wg]), read(index_smem.at[wg]).astype(jnp.float32)

                def one_round(slot, last_best):  # type: ignore[no-untyped-def]
                    top, at = last_best

                    def after(value, index):  # type: ignore[no-untyped-def]
                        over, here = along(top, small, 1), along(at, small, 1)
                        return (value < over) | ((value == over) & (index > here))

                    def largest(tile, found):  # type: ignore[no-untyped-def]
                        value = read(importance.at[wg, pl.ds(tile * ROWS, ROWS)])
                        value = jnp.where(after(value, index_of(tile)), value, NO_CANDIDATE)
                        return jnp.maximum(found, value)

                    found = jnp.where(after(old_value, old_index), old_value, NO_CANDIDATE)
                    new_top = best(lax.fori_loop(0, tiles, largest, found), lowest=False)

                    def first(tile, found):  # type: ignore[no-untyped-def]
                        value, index = read(importance.at[wg, pl.ds(tile * ROWS, ROWS)]), index_of(tile)
                        is_top = (value == along(new_top, small, 1)) & after(value, index)
                        return jnp.minimum(found, jnp.where(is_top, index, NOTHING))

                    is_top = (old_value == along(new_top, small, 1)) & after(old_value, old_index)
                    found = jnp.where(is_top, old_index, NOTHING)
                    new_at = best(lax.fori_loop(0, tiles, first, found), lowest=True)
                    value_smem.at[wg, slot][...] = new_top
                    index_smem.at[wg, slot][...] = jnp.where(new_top >= 0, new_at, -1.0).astype(jnp.int32)
                    return new_top, new_at

                before = vector(ABOVE, 0, columns), vector(-1.0, 0, columns)
                lax.fori_loop(0, count, one_round, before)

            first_part = lax.div(start, tiles_at_once)
            parts = jnp.maximum(lax.div(stop + (tiles_at_once - 1), tiles_at_once) - first_part, 1)

            @pl.loop(0, parts)
            def one_part(part) -> None:  # type: ignore[no-untyped-def]
                base = (first_part + part) * tiles_at_once
                begin, end = jnp.maximum(start, base), jnp.minimum(stop, base + tiles_at_once)
                lax.fori_loop(begin, end, lambda step, _: add_tile(step, base), None)
                plgpu.commit_smem()
                select(base, part == parts - 1)
                plgpu.commit_smem()

                @pl.when(part < parts - 1)
                def go_on() -> None:
                    left = read(importance.at[wg, pl.ds(at_once, ROWS)])
                    plgpu.commit_smem()
                    importance.at[wg, pl.ds(0, ROWS)][...] = left
                    plgpu.commit_smem()

            found = index_smem.at[wg, pl.ds(0, slots)]
            plgpu.copy_smem_to_gmem(found, out_ref.at[x, w])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")
            plgpu.copy_gmem_to_smem(table_ref, table_smem, table_ready)
            plgpu.copy_gmem_to_smem(adding_ref, adding_smem, table_ready)
            where = lambda step: [((x, pl.ds((start + step) * ROWS, ROWS)), ())]
            serve(stop - start, where, [Channel(k_ref, k_smem, k_full, k_free)], stages)

    smem: Any = (
        swizzled((wgs, own_rows, dim), dtype),
        swizzled((stages, ROWS, dim), dtype),
        plgpu.SMEM((wgs, own_rows), jnp.float32),
        swizzled((columns, own_rows), jnp.bfloat16),
        swizzled((phases, ROWS, ROWS), jnp.bfloat16),
        swizzled((wgs, 2, columns, ROWS), jnp.bfloat16),
        plgpu.SMEM((wgs, 8, columns), jnp.int32),
        plgpu.SMEM((wgs, buffer_rows, columns), jnp.float32),
        plgpu.SMEM((wgs, ROWS, columns), jnp.float32),
        plgpu.SMEM((wgs, ROWS, columns), jnp.int32),
        plgpu.SMEM((wgs, ROWS + 1, columns), jnp.float32),
        None if tuning.registers else swizzled((wgs, *square), jnp.bfloat16),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=2 + place.pieces(own_rows), num_barriers=wgs),
        plgpu.Barrier(num_arrivals=2),
        *ring(stages, wgs),
    )
    phase_operands = () if choosing.phases is None else (choosing.phases,)
    out_type = jax.ShapeDtypeStruct((groups, rows // own_rows, slots, columns), jnp.int32)
    kernel = by_rows(
        nsa_choice, out_type, smem, barriers, tiles=rows // tile_rows, groups=groups, warpgroups=wgs
    )
    return kernel(
        q,
        k,
        choosing.lse,
        choosing.bounds,
        choosing.columns,
        *phase_operands,
        adding,
        table,
    )
