"""Kernel for Hopper behind the selection of blocks: the attention of a group to each compressed key."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.hopper import LOG2_E, ROWS, along, product, swizzled, visible_keys
from kernels_pallas.nsa.mosaic_gpu.common import Channel, Ranges, Tuning, Visible, by_rows, ring, serve

SCORE_ROWS = 128
"""Of a warpgroup: 8 queries with 16 heads, the smallest N of wgmma."""


def group_shares(
    q: Float[Array, "X R Dk"],
    k: Float[Array, "X M Dk"],
    lse: Float[Array, "X R"],
    visible: Visible,
    plan: Ranges,
    *,
    heads_per_query: int,
    scale: float,
    tuning: Tuning,
) -> Float[Array, "X R/128 M columns"]:
    """Softmax weights summed over the heads of each query, float32.

    `lse` is in base 2, 0 for rows that see nothing. Tile p of 128 rows has its queries in the first columns.
    What lies outside of the tiles of keys that the plan names is not written. The sum over heads is a matrix
    product with zeros and ones; each weight enters as two numbers of 16 bits, together exact to 2^-16.
    R is a multiple of 128 * warpgroups, M of 64, Dk of 64.
    """
    groups, rows, dim = q.shape
    keys, dtype = k.shape[1], q.dtype
    wgs, stages = tuning.warpgroups, tuning.stages
    tile_rows = wgs * SCORE_ROWS
    heads = groups // visible.first.shape[0]
    columns = max(8, SCORE_ROWS // heads_per_query)
    shape = (ROWS, SCORE_ROWS)
    of_query = jnp.arange(SCORE_ROWS, dtype=jnp.int32) // heads_per_query
    adding = (jnp.arange(columns, dtype=jnp.int32)[:, None] == of_query[None, :]).astype(dtype)

    def nsa_group_shares(*refs):  # type: ignore[no-untyped-def]
        q_ref, k_ref, lse_ref, first_ref, end_ref, bounds_ref, adding_ref, out_ref, smem, barriers = refs
        q_smem, k_smem, lse_smem, number_smem, adding_smem, through = smem
        ready, k_full, k_free = barriers
        x, p, wg = lax.axis_index("x"), lax.axis_index("p"), lax.axis_index("wg")
        batch = lax.div(x, heads)
        start, stop = bounds_ref[batch, p, 0], bounds_ref[batch, p, 3]
        steps = stop - start

        @pl.when(wg < wgs)
        def compute() -> None:
            plgpu.set_max_registers(232 if wgs == 2 else 240, action="increase")
            mine = pl.ds(p * tile_rows + wg * SCORE_ROWS, SCORE_ROWS)
            for source, target in (
                (q_ref.at[x, mine], q_smem.at[wg]),
                (lse_ref.at[x, mine], lse_smem.at[wg]),
                (first_ref.at[batch, mine], number_smem.at[wg, 0]),
                (end_ref.at[batch, mine], number_smem.at[wg, 1]),
                (adding_ref, adding_smem.at[wg]),
            ):
                plgpu.copy_gmem_to_smem(source, target, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            load = lambda ref: plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))
            add_up = adding_smem.at[wg].transpose((1, 0))

            @pl.loop(0, steps)
            def one_step(step) -> None:  # type: ignore[no-untyped-def]
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(k_full.at[slot])
                scores = product(k_smem.at[slot], q_smem.at[wg].transpose((1, 0)), shape)
                plgpu.barrier_arrive(k_free.at[slot])
                # Loaded anew in each step: kept, the three would take 96 registers.
                first, end = load(number_smem.at[wg, 0]), load(number_smem.at[wg, 1])
                seen = visible_keys(first, end, start + step, shape, 1)
                scores = jnp.where(seen, scores * (scale * LOG2_E), -jnp.inf)
                weights = jnp.exp2(scores - along(load(lse_smem.at[wg]), shape, 1))
                coarse = weights.astype(dtype)
                fine = (weights - coarse.astype(jnp.float32)).astype(dtype)
                if tuning.registers:

                    def both(acc):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(acc, coarse, add_up)
                        plgpu.wgmma(acc, fine, add_up)
                        return acc[...]

                    shares = pl.run_scoped(both, plgpu.ACC((ROWS, columns), jnp.float32))
                else:
                    parts = []
                    for part in (coarse, fine):
                        through.at[wg][...] = part
                        plgpu.commit_smem()
                        parts.append(product(through.at[wg], add_up, (ROWS, columns)))
                    shares = parts[0] + parts[1]
                out_ref[x, p * wgs + wg, pl.ds((start + step) * ROWS, ROWS)] = shares

        @pl.when(wg == wgs)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")

            where = lambda step: [((x, pl.ds((start + step) * ROWS, ROWS)), ())]
            serve(steps, where, [Channel(k_ref, k_smem, k_full, k_free)], stages)

    smem: Any = (
        swizzled((wgs, SCORE_ROWS, dim), dtype),
        swizzled((stages, ROWS, dim), dtype),
        plgpu.SMEM((wgs, SCORE_ROWS), jnp.float32),
        plgpu.SMEM((wgs, 2, SCORE_ROWS), jnp.int32),
        swizzled((wgs, columns, SCORE_ROWS), dtype),
        None if tuning.registers else swizzled((wgs, *shape), dtype),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=5, num_barriers=wgs),
        *ring(stages, wgs),
    )
    out_type = jax.ShapeDtypeStruct((groups, rows // SCORE_ROWS, keys, columns), jnp.float32)
    kernel = by_rows(
        nsa_group_shares, out_type, smem, barriers, tiles=rows // tile_rows, groups=groups, warpgroups=wgs
    )
    return kernel(q, k, lse, *visible, plan.bounds, adding)
