"""Backward kernel for Hopper of queries: dq, over the keys that each tile of rows reads.

No atomics: each gradient is written by one warpgroup, in a fixed order. Axis letters as in common.py.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels_pallas.hopper import LOG2_E, ROWS, add_product, along, product, swizzled, visible_keys, zeros
from kernels_pallas.nsa.mosaic_gpu.common import (
    Channel,
    Lists,
    Ranges,
    Saved,
    Tuning,
    by_rows,
    go_through,
    limits_in_tile,
    operands,
    ring,
    route,
    serve,
)
from kernels_pallas.nsa.mosaic_gpu.query_rows import key_shape, key_slice, places_of, result_of


def query_gradient(
    saved: Saved,
    k: Array,
    v: Array,
    plan: Ranges | Lists,
    *,
    scale: float,
    tuning: Tuning,
    before: Array | None = None,
) -> Array:
    """Gradient of the queries in their dtype, where they are, added to `before`; the plan is that of the
    forward pass."""
    q, d_out = saved.q, saved.d_out
    groups, _, key_dim = key_shape(k)
    rows, value_dim, dtype = saved.lse.shape[1], key_shape(v).dim, q.dtype
    q_place, out_place = places_of(saved)
    heads = groups // saved.visible.first.shape[0]
    gated = saved.gate is not None
    listed, wgs = isinstance(plan, Lists), tuning.warpgroups
    # Through shared memory, the largest head dims leave place for one tile of keys.
    stages = tuning.stages if tuning.registers or key_dim + value_dim < 320 else 1
    plan_operands, shape = operands(plan), (ROWS, tuning.keys)

    def nsa_query_gradient(*all_refs):  # type: ignore[no-untyped-def]
        refs: Any = all_refs
        q_ref, do_ref, lse_ref, shift_ref, first_ref, end_ref, k_ref, v_ref, *refs = refs
        plan_refs, refs = refs[: len(plan_operands)], refs[len(plan_operands) :]
        gate_ref, *refs = refs if gated else (None, *refs)
        before_ref, *refs = refs if before is not None else (None, *refs)
        dq_ref, smem, barriers = refs
        q_smem, do_smem, row_smem, number_smem, k_smem, v_smem, ds_smem, dq_smem = smem
        ready, k_full, v_full, k_free, v_free = barriers
        x, p, wg = lax.axis_index("x"), lax.axis_index("p"), lax.axis_index("wg")
        batch = lax.div(x, heads)
        way = route(listed, plan_refs, x, batch, p)
        channels = Channel(k_ref, k_smem, k_full, k_free), Channel(v_ref, v_smem, v_full, v_free)

        @pl.when(wg < wgs)
        def compute() -> None:
            plgpu.set_max_registers(232 if wgs == 2 else 240, action="increase")
            first_row = p * tuning.rows + wg * ROWS
            mine = pl.ds(first_row, ROWS)
            q_place.load(q_ref, x, first_row, q_smem.at[wg], ready.at[wg])
            out_place.load(do_ref, x, first_row, do_smem.at[wg], ready.at[wg])
            copies = [
                (lse_ref.at[x, mine], row_smem.at[wg, 0]),
                (shift_ref.at[x, mine], row_smem.at[wg, 1]),
                (first_ref.at[batch, mine], number_smem.at[wg, 0]),
                (end_ref.at[batch, mine], number_smem.at[wg, 1]),
            ]
            if gated:
                copies.append((gate_ref.at[x, mine], row_smem.at[wg, 2]))
            if before is not None:
                q_place.load(before_ref, x, first_row, dq_smem.at[wg], ready.at[wg])
            if listed:
                copies.append((plan_refs[3].at[pl.ds(wg * ROWS, ROWS)], number_smem.at[wg, 2]))
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            load = lambda ref: plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))
            lse, shift = load(row_smem.at[wg, 0]), load(row_smem.at[wg, 1])
            first, end = load(number_smem.at[wg, 0]), load(number_smem.at[wg, 1])
            gate: Any = load(row_smem.at[wg, 2]) if gated else None
            bits: Any = load(number_smem.at[wg, 2]) if listed else None

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
                if gated:
                    weights = weights * along(gate, shape, 0)
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
            if before is not None:
                dq = dq + plgpu.load(dq_smem.at[wg], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            dq_smem.at[wg][...] = dq.astype(dtype)
            plgpu.commit_smem()
            q_place.store(dq_smem.at[wg], dq_ref, x, first_row)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")

            tile = lambda step: pl.ds(way.key_tile(step) * tuning.keys, tuning.keys)
            serve(way.steps, lambda step: [(key_slice(k_ref, x, tile(step)), ())], channels, stages)

    smem: Any = (
        swizzled((wgs, ROWS, key_dim), dtype),
        swizzled((wgs, ROWS, value_dim), dtype),
        plgpu.SMEM((wgs, 3, ROWS), jnp.float32),
        plgpu.SMEM((wgs, 3, ROWS), jnp.int32),
        swizzled((stages, tuning.keys, key_dim), dtype),
        swizzled((stages, tuning.keys, value_dim), dtype),
        None if tuning.registers else swizzled((wgs, *shape), dtype),
        swizzled((wgs, ROWS, key_dim), dtype),
    )
    pieces = q_place.pieces(ROWS) * (1 if before is None else 2) + out_place.pieces(ROWS) + gated
    (k_full, k_free), (v_full, v_free) = ring(stages, wgs), ring(stages, wgs)
    barriers = (
        plgpu.Barrier(num_arrivals=(5 if listed else 4) + pieces, num_barriers=wgs),
        k_full,
        v_full,
        k_free,
        v_free,
    )
    out_type = result_of(q_place, dtype)
    kernel = by_rows(
        nsa_query_gradient, out_type, smem, barriers, tiles=rows // tuning.rows, groups=groups, warpgroups=wgs
    )
    return kernel(
        q,
        d_out,
        saved.lse,
        saved.shift,
        *saved.visible,
        k,
        v,
        *plan_operands,
        *(x for x in (saved.gate, before) if x is not None),
    )
