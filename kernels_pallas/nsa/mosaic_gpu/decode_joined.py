"""What stands between and after the two launches of decode.py, one kernel each: selection of blocks from the
scores of compressed keys, and the branches joined over the programs and added with their gates.

Axis letters as in decode.py. One warpgroup a program.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import LOG2_E, ROWS, along, swizzled, vector
from kernels_pallas.nsa.base import SelectionGrid, ceil_div
from kernels_pallas.nsa.mosaic_gpu.choice import FORCED, NO_CANDIDATE, NOTHING, Spread, overlaps, spread_of
from kernels_pallas.nsa.mosaic_gpu.common import FLOOR

CHUNKS = 8
"""Columns of a tile of importance: each has a stretch of the keys of its own."""
_SCRATCH = 4096
MOST_ROWS = 4096
"""Of importance in shared memory."""
_WIDE, _ACROSS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)


class Partial(NamedTuple):
    """What programs first ... end of a launch found: sums of values times weights, the maximum of the scores
    in base 2, and the sum of weights."""

    total: Float[Array, "X parts Dv G"]
    top: Float[Array, "X parts G"]
    weight: Float[Array, "X parts G"]
    first: int
    end: int


def _tile(x: Array) -> Array:
    return plgpu.layout_cast(x, _WIDE)


def _weights(top_ref: Any, weight_ref: Any, x: Array, first: int, end: int, heads: int) -> tuple[Any, Any]:
    """Maximum of the programs' scores and the sum of weights at it, of each head."""

    def one(part, carry):  # type: ignore[no-untyped-def]
        top, weight = carry
        other = plgpu.load(top_ref.at[x, part], layout=_ACROSS, optimized=False)
        more = plgpu.load(weight_ref.at[x, part], layout=_ACROSS, optimized=False)
        new = jnp.maximum(top, other)
        return new, weight * jnp.exp2(top - new) + more * jnp.exp2(other - new)

    return lax.fori_loop(first, end, one, (vector(FLOOR, 0, heads), vector(0.0, 0, heads)))


class Joined(NamedTuple):
    out: Float[Array, "X G Dv"]
    branches: Float[Array, "X 3 G Dv"]
    lse: Float[Array, "X G"]
    """Of the first branch, natural; -inf for nothing."""


def join_and_gate(
    found: tuple[Partial, Partial, Partial],
    gates: Float[Array, "X G 3"],
    num_new: Int[Array, " B"],
    dtype: jax.typing.DTypeLike,
) -> Joined:
    """Of each branch the sums of all programs; the sum with gates is 0 for a sequence without a new token."""
    groups, _, value_dim, heads = found[0].total.shape
    kv_heads = groups // num_new.shape[0]
    own = gates.shape[1]
    shape = (ROWS, heads)

    def nsa_decode_join(*refs):  # type: ignore[no-untyped-def]
        *branch_refs, gates_ref, new_ref, out_ref, branches_ref, lse_ref, smem = refs
        x, row = lax.axis_index("x"), lax.axis_index("row") * ROWS
        there = new_ref[lax.div(x, kv_heads)] > 0
        whole = _tile(jnp.zeros(shape, jnp.float32))
        for i, partial in enumerate(found):
            total_ref, top_ref, weight_ref = branch_refs[3 * i : 3 * i + 3]
            top, weight = _weights(top_ref, weight_ref, x, partial.first, partial.end, heads)
            if i == 0:
                lse = jnp.where(weight > 0, (top + jnp.log(weight) * LOG2_E) * (1 / LOG2_E), -jnp.inf)
                lse_ref[x] = lse

            def add(part, acc, total_ref=total_ref, top_ref=top_ref, top=top):  # type: ignore[no-untyped-def]
                here = plgpu.load(total_ref.at[x, part, pl.ds(row, ROWS)], layout=_WIDE, optimized=False)
                other = plgpu.load(top_ref.at[x, part], layout=_ACROSS, optimized=False)
                return acc + here * along(jnp.exp2(other - top), shape, 1)

            acc = lax.fori_loop(partial.first, partial.end, add, _tile(jnp.zeros(shape, jnp.float32)))
            acc = acc / along(jnp.where(weight > 0, weight, 1.0), shape, 1)
            smem.at[i].transpose((1, 0))[...] = acc.astype(dtype)
            gate = vector(0.0, 0, heads)
            head = plgpu.broadcasted_iota(jnp.int32, (heads,), 0, layout=_ACROSS)
            for h in range(own):  # three gates lie beside each other, which no vector load can pick apart
                one = jnp.full((heads,), gates_ref[x, h, i].astype(jnp.float32), jnp.float32)
                gate = jnp.where(head == h, plgpu.layout_cast(one, _ACROSS), gate)
            # As the branch is rounded before it is weighed elsewhere.
            whole = whole + acc.astype(dtype).astype(jnp.float32) * along(gate, shape, 1)
        number = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WIDE)
        whole = jnp.where(number < jnp.where(there, ROWS, 0), whole, 0.0)
        smem.at[3].transpose((1, 0))[...] = whole.astype(dtype)
        plgpu.commit_smem()
        for i in range(3):
            plgpu.copy_smem_to_gmem(smem.at[i], branches_ref.at[x, i, :, pl.ds(row, ROWS)])
        plgpu.copy_smem_to_gmem(smem.at[3], out_ref.at[x, :, pl.ds(row, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    arrays = [x for partial in found for x in partial[:3]]
    return Joined(
        *plgpu.kernel(
            nsa_decode_join,
            out_type=(
                jax.ShapeDtypeStruct((groups, heads, value_dim), dtype),
                jax.ShapeDtypeStruct((groups, 3, heads, value_dim), dtype),
                jax.ShapeDtypeStruct((groups, heads), jnp.float32),
            ),
            scratch_types=(swizzled((4, heads, ROWS), dtype),),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            grid=(value_dim // ROWS, groups),
            grid_names=("row", "x"),
        )(*arrays, gates, num_new)
    )


class Stretches(NamedTuple):
    """How the keys of a cache are cut among the columns: static."""

    spread: Spread
    tiles: int
    """Of 64 keys, in each column."""

    @property
    def rows(self) -> int:
        """Of importance, those around a column's own included."""
        return self.tiles * self.spread.step + ROWS


def stretches(grid: SelectionGrid, keys: int) -> Stretches | None:
    """None: blocks that the kernel cannot do, or too many of them."""
    spread = spread_of(grid)
    if spread is None or grid.block_size != ROWS:
        return None
    each = ceil_div(ceil_div(keys, ROWS * CHUNKS), spread.ratio) * spread.ratio
    found = Stretches(spread, each)
    return found if each * CHUNKS * spread.step >= grid.candidates and found.rows <= MOST_ROWS else None


def select_tiles(
    scores: Float[Array, "X keys G"],
    found: Partial,
    own_heads: int,
    length: Int[Array, " B"],
    num_new: Int[Array, " B"],
    grid: SelectionGrid,
    cut: Stretches,
) -> Int[Array, "X 64"]:
    """The selected blocks of one new token, by falling importance, then -1, in the first `num_blocks`.

    `scores` in base 2, of all keys; of the tiles that the token does not see they are not read into anything.
    Each column of a tile has the keys of a stretch: its tiles one after the other, beginning with the last
    one of the stretch before, whose keys reach into the stretch's first block.
    """
    groups, keys, heads = scores.shape
    kv_heads = groups // length.shape[0]
    step, tiles, last_tile = cut.spread.step, cut.tiles, keys // ROWS - 1
    wide, small = (ROWS, heads), (ROWS, CHUNKS)
    table = jnp.asarray(overlaps(grid, cut.spread, 1)[0], jnp.bfloat16)

    def nsa_decode_choice(*refs):  # type: ignore[no-untyped-def]
        scores_ref, top_ref, weight_ref, length_ref, new_ref, table_ref, out_ref, smem, ready = refs
        table_smem, part_smem, importance = smem
        x = lax.axis_index("x")
        batch = lax.div(x, kv_heads)
        plgpu.copy_gmem_to_smem(table_ref, table_smem, ready)
        present = jnp.where(new_ref[batch] > 0, length_ref[batch], 0)
        complete = lax.div(jnp.maximum(present - grid.block_len, 0), grid.stride) + 1
        visible = jnp.where(present >= grid.block_len, complete, 0)
        newest = lax.div(present + grid.block_size - 1, grid.block_size) - 1
        top, weight = _weights(top_ref, weight_ref, x, found.first, found.end, heads)
        seen_any = jnp.where(weight > 0, weight, 1.0)
        floor = jnp.where(weight > 0, top + jnp.log(seen_any) * LOG2_E, 0.0)
        number = lambda shape, axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_WIDE)
        column, row = number(small, 1), number(small, 0)
        plgpu.barrier_wait(ready)

        @pl.loop(0, tiles + 1)
        def one_step(s) -> None:  # type: ignore[no-untyped-def]
            shares = _tile(jnp.zeros(small, jnp.float32))
            for c in range(CHUNKS):
                tile = c * tiles + s - 1
                first = jnp.clip(tile, 0, last_tile) * ROWS
                here = plgpu.load(scores_ref.at[x, pl.ds(first, ROWS)], layout=_WIDE, optimized=False)
                weights = jnp.exp2(jnp.minimum(here - along(floor, wide, 1), 1.0))
                inside = (tile >= 0) & (tile <= last_tile)
                limit = jnp.where(inside, visible - first, 0)
                seen = (number(wide, 0) < limit) & (number(wide, 1) < own_heads)
                total = jnp.where(seen, weights, 0.0).sum(axis=1)
                shares = jnp.where(column == c, along(total, small, 0), shares)
            coarse = shares.astype(jnp.bfloat16)
            fine = (shares - coarse.astype(jnp.float32)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            part_smem.at[0].transpose((1, 0))[...] = coarse
            part_smem.at[1].transpose((1, 0))[...] = fine
            plgpu.commit_smem()

            def both(acc):  # type: ignore[no-untyped-def]
                for i in range(2):
                    plgpu.wgmma(acc, table_smem, part_smem.at[i].transpose((1, 0)))
                return acc[...]

            total = pl.run_scoped(both, plgpu.ACC(small, jnp.float32))
            there = importance.at[pl.ds(s * step, ROWS)]
            before = plgpu.load(there, layout=_WIDE, optimized=False)
            there[...] = total + jnp.where((row < ROWS - step) & (s > 0), before, 0.0)

        plgpu.commit_smem()
        row_tiles = cut.rows // ROWS

        def index_of(tile):  # type: ignore[no-untyped-def]
            return row + tile * ROWS - (1 + step) + column * (tiles * step)

        def read(tile):  # type: ignore[no-untyped-def]
            return plgpu.load(importance.at[pl.ds(tile * ROWS, ROWS)], layout=_WIDE, optimized=False)

        @pl.loop(0, row_tiles)
        def prepare(tile) -> None:  # type: ignore[no-untyped-def]
            index, at = index_of(tile), row + tile * ROWS
            forced = (index < grid.num_init) | (index > newest - grid.num_local)
            own = (at > step) & (at <= step + tiles * step) & (index <= newest)
            value = jnp.where(own, jnp.where(forced, FORCED, read(tile)), NO_CANDIDATE)
            importance.at[pl.ds(tile * ROWS, ROWS)][...] = value

        def everywhere(x, lowest):  # type: ignore[no-untyped-def]
            """The largest or lowest number of a tile, in all of its places."""
            of_columns = x.min(axis=0) if lowest else x.max(axis=0)
            x = along(of_columns, small, 1)
            return along(x.min(axis=1) if lowest else x.max(axis=1), small, 0)

        def one_round(slot, carry):  # type: ignore[no-untyped-def]
            result, top, at = carry

            def after(value, index):  # type: ignore[no-untyped-def]
                return (value < top) | ((value == top) & (index > at))

            def largest(tile, found):  # type: ignore[no-untyped-def]
                value = read(tile)
                is_left = after(value, index_of(tile).astype(jnp.float32))
                return jnp.maximum(found, jnp.where(is_left, value, NO_CANDIDATE))

            nothing = _tile(jnp.full(small, NO_CANDIDATE, jnp.float32))
            new_top = everywhere(lax.fori_loop(0, row_tiles, largest, nothing), lowest=False)

            def lowest(tile, found):  # type: ignore[no-untyped-def]
                value, index = read(tile), index_of(tile).astype(jnp.float32)
                is_top = (value == new_top) & after(value, index)
                return jnp.minimum(found, jnp.where(is_top, index, NOTHING))

            nowhere = _tile(jnp.full(small, NOTHING, jnp.float32))
            new_at = everywhere(lax.fori_loop(0, row_tiles, lowest, nowhere), lowest=True)
            taken = jnp.where(new_top >= 0, new_at, -1.0)
            return jnp.where(row == slot, taken, result), new_top, new_at

        full = lambda value: _tile(jnp.full(small, value, jnp.float32))
        result, _, _ = lax.fori_loop(
            0, grid.num_blocks, one_round, (full(-1.0), full(2 * FORCED), full(-1.0))
        )
        out_ref[x] = result.max(axis=1).astype(jnp.int32)

    return plgpu.kernel(
        nsa_decode_choice,
        out_type=jax.ShapeDtypeStruct((groups, ROWS), jnp.int32),
        scratch_types=(
            (
                swizzled((ROWS, ROWS), jnp.bfloat16),
                swizzled((2, CHUNKS, ROWS), jnp.bfloat16),
                plgpu.SMEM((cut.rows, CHUNKS), jnp.float32),
            ),
            plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=_SCRATCH),
        grid=(groups,),
        grid_names=("x",),
    )(scores, found.top, found.weight, length, num_new, table)
