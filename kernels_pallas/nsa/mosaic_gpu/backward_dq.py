"""Backward kernel for Hopper of queries: dq, over the keys that each tile of rows reads.

No atomics: each gradient is written by one warpgroup, in a fixed order. Axis letters as in common.py.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.hopper import LOG2_E, ROWS, add_product, along, product, swizzled, visible_keys, zeros
from kernels_pallas.nsa.mosaic_gpu.common import (
    Channel,
    Lists,
    Ranges,
    Saved,
    Tuning,
    go_through,
    limits_in_tile,
    operands,
    route,
    serve,
)


def query_gradient(
    saved: Saved,
    k: Float[Array, "X S Dk"],
    v: Float[Array, "X S Dv"],
    plan: Ranges | Lists,
    *,
    scale: float,
    tuning: Tuning,
) -> Float[Array, "X R Dk"]:
    """Gradient of the queries in their dtype; the plan is that of the forward pass."""
    q, d_out = saved.q, saved.d_out
    groups, rows, key_dim = q.shape
    value_dim, dtype = v.shape[2], q.dtype
    heads = groups // saved.visible.first.shape[0]
    listed, wgs, stages = isinstance(plan, Lists), tuning.warpgroups, tuning.stages
    plan_operands, shape = operands(plan), (ROWS, tuning.keys)

    def nsa_query_gradient(*refs):  # type: ignore[no-untyped-def]
        q_ref, do_ref, lse_ref, shift_ref, first_ref, end_ref, k_ref, v_ref, *plan_refs = refs[
            : 8 + len(plan_operands)
        ]
        dq_ref, smem, barriers = refs[8 + len(plan_operands) :]
        q_smem, do_smem, row_smem, number_smem, k_smem, v_smem, ds_smem, dq_smem = smem
        ready, k_full, v_full, k_free, v_free = barriers
        x, p, wg = lax.axis_index("x"), lax.axis_index("p"), lax.axis_index("wg")
        batch = lax.div(x, heads)
        way = route(listed, plan_refs, x, batch, p)
        channels = Channel(k_ref, k_smem, k_full, k_free), Channel(v_ref, v_smem, v_full, v_free)

        @pl.when(wg < wgs)
        def compute() -> None:
            plgpu.set_max_registers(232 if wgs == 2 else 240, action="increase")
            mine = pl.ds(p * tuning.rows + wg * ROWS, ROWS)
            copies = [
                (q_ref.at[x, mine], q_smem.at[wg]),
                (do_ref.at[x, mine], do_smem.at[wg]),
                (lse_ref.at[x, mine], row_smem.at[wg, 0]),
                (shift_ref.at[x, mine], row_smem.at[wg, 1]),
                (first_ref.at[batch, mine], number_smem.at[wg, 0]),
                (end_ref.at[batch, mine], number_smem.at[wg, 1]),
            ]
            if listed:
                copies.append((plan_refs[3].at[pl.ds(wg * ROWS, ROWS)], number_smem.at[wg, 2]))
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            load = lambda ref: plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))
            lse, shift = load(row_smem.at[wg, 0]), load(row_smem.at[wg, 1])
            first, end = load(number_smem.at[wg, 0]), load(number_smem.at[wg, 1])
            bits = load(number_smem.at[wg, 2]) if listed else None

            def differentiate(slot, step, dq, masked):  # type: ignore[no-untyped-def]
                plgpu.barrier_wait(k_full.at[slot])
                scores = product(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), shape)
                scores = scores * (scale * LOG2_E)
                if masked:
                    tile, (begin, limit) = way.key_tile(step), (first, end)
                    if listed:
                        tails = plan_refs[5][x, p, step] if len(plan_refs) > 5 else None
                        begin, limit = limits_in_tile(first, end, tile, bits, plan_refs[2][x, p, step], tails)
                    seen = visible_keys(begin, limit, tile, shape, 0)
                    scores = jnp.where(seen, scores, -jnp.inf)
                weights = jnp.exp2(scores - along(lse, shape, 0))
                plgpu.barrier_wait(v_full.at[slot])
                d_weights = product(do_smem.at[wg], v_smem.at[slot].transpose((1, 0)), shape)
                plgpu.barrier_arrive(v_free.at[slot])
                d_scores = weights * (d_weights - along(shift, shape, 0)) * scale
                through = None if tuning.registers else ds_smem.at[wg]
                dq = add_product(dq, d_scores.astype(dtype), k_smem.at[slot], through, tuning.registers)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            dq = zeros((ROWS, key_dim))
            listing = plan_refs if listed else None
            dq = go_through(way, listing, (x, p, wg), channels, stages, differentiate, dq)
            dq_smem.at[wg][...] = dq.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_smem.at[wg], dq_ref.at[x, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")

            tile = lambda step: pl.ds(way.key_tile(step) * tuning.keys, tuning.keys)
            serve(way.steps, lambda step: [((x, tile(step)), ())], channels, stages)

    smem: Any = (
        swizzled((wgs, ROWS, key_dim), dtype),
        swizzled((wgs, ROWS, value_dim), dtype),
        plgpu.SMEM((wgs, 2, ROWS), jnp.float32),
        plgpu.SMEM((wgs, 3, ROWS), jnp.int32),
        swizzled((stages, tuning.keys, key_dim), dtype),
        swizzled((stages, tuning.keys, value_dim), dtype),
        None if tuning.registers else swizzled((wgs, *shape), dtype),
        swizzled((wgs, ROWS, key_dim), dtype),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=7 if listed else 6, num_barriers=wgs),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )
    return plgpu.kernel(
        nsa_query_gradient,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch_types=(smem, barriers),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(rows // tuning.rows, groups),
        grid_names=("p", "x"),
        num_threads=wgs + 1,
        thread_name="wg",
    )(q, d_out, saved.lse, saved.shift, *saved.visible, k, v, *plan_operands)
