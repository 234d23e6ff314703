"""Backward kernel for Hopper of keys and values: dk and dv, over the queries that read each tile of keys.

No atomics: each gradient is written by one warpgroup, in a fixed order. Axis letters as in common.py.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels_pallas.hopper import LOG2_E, ROWS, add_product, along, product, swizzled, visible_keys, zeros
from kernels_pallas.nsa.mosaic_gpu.common import Inverse, Saved, Tuning, limits_in_tile, operands
from kernels_pallas.nsa.mosaic_gpu.query_rows import key_shape, key_slice, places_of


def key_gradients(
    saved: Saved,
    k: Array,
    v: Array,
    plan: Int[Array, "B tiles 2"] | Inverse,
    *,
    row_bits: Int[Array, " rows"] | None = None,
    scale: float,
    tuning: Tuning,
) -> tuple[Array, Array]:
    """Gradients of keys and values in their dtype, where they are.

    Each program has 64 keys and goes through the tiles of 64 rows that read them: a first and an end for each
    tile of keys, or the inverse of lists whose rows have `row_bits`. One warpgroup makes the probabilities
    and sums the values' gradient, a second one takes the probabilities and sums that of the keys: both in one
    would not fit into a warpgroup's registers. Of `tuning`, warpgroups and keys have no meaning here.
    """
    groups, length, key_dim = key_shape(k)
    value_dim, dtype = key_shape(v).dim, k.dtype
    q_place, out_place = places_of(saved)
    heads = groups // saved.visible.first.shape[0]
    gated = saved.gate is not None
    listed, stages = isinstance(plan, Inverse), tuning.stages
    shape = (ROWS, ROWS)
    plan_operands = [*operands(plan), row_bits] if isinstance(plan, Inverse) else [plan]

    def nsa_key_gradients(*all_refs):  # type: ignore[no-untyped-def]
        refs: Any = all_refs
        q_ref, do_ref, lse_ref, shift_ref, first_ref, end_ref, k_ref, v_ref, *refs = refs
        plan_refs, refs = refs[: len(plan_operands)], refs[len(plan_operands) :]
        gate_ref, *refs = refs if gated else (None, *refs)
        dk_ref, dv_ref, smem, barriers = refs
        k_smem, v_smem, q_smem, do_smem, row_smem, number_smem, bits_smem, p_smem, ds_smem = smem
        k_ready, v_ready, full, made, free = barriers
        x, j, wg = lax.axis_index("x"), lax.axis_index("j"), lax.axis_index("wg")
        batch = lax.div(x, heads)
        if listed:
            start = plan_refs[0][x, j]
            steps = plan_refs[0][x, j + 1] - start
        else:
            start = plan_refs[0][batch, j, 0]
            steps = plan_refs[0][batch, j, 1] - start
        here = pl.ds(j * ROWS, ROWS)

        def load(ref, axis=0):  # type: ignore[no-untyped-def]
            return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis))

        @pl.when(wg == 0)
        def of_values() -> None:
            plgpu.set_max_registers(232, action="increase")
            plgpu.copy_gmem_to_smem(k_ref.at[key_slice(k_ref, x, here)], k_smem, k_ready)
            if listed:
                plgpu.copy_gmem_to_smem(plan_refs[-1], bits_smem, k_ready)
            plgpu.barrier_wait(k_ready)
            bits: Any = load(bits_smem) if listed else None

            def one_step(step, dv):  # type: ignore[no-untyped-def]
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[slot])
                scores = product(k_smem, q_smem.at[slot].transpose((1, 0)), shape) * (scale * LOG2_E)
                first, end = load(number_smem.at[slot, 0]), load(number_smem.at[slot, 1])
                if listed:
                    tails = plan_refs[3][x, start + step] if len(plan_refs) > 4 else None
                    first, end = limits_in_tile(first, end, j, bits, plan_refs[2][x, start + step], tails)
                seen = visible_keys(first, end, j, shape, 1)
                scores = jnp.where(seen, scores, -jnp.inf)
                weights = jnp.exp2(scores - along(load(row_smem.at[slot, 0]), shape, 1))
                if gated:
                    weights = weights * along(load(row_smem.at[slot, 2]), shape, 1)
                weights = weights.astype(dtype)
                p_smem.at[slot][...] = weights
                plgpu.commit_smem()
                plgpu.barrier_arrive(made.at[slot])
                if tuning.registers:
                    dv = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, do_smem.at[slot]))(
                        plgpu.ACC.init(dv)
                    )
                else:
                    dv = dv + product(p_smem.at[slot], do_smem.at[slot], dv.shape)
                plgpu.barrier_arrive(free.at[slot])
                return dv

            dv = lax.fori_loop(0, steps, one_step, zeros((ROWS, value_dim)))
            dv_ref[key_slice(dv_ref, x, here)] = dv.astype(dtype)

        @pl.when(wg == 1)
        def of_keys() -> None:
            plgpu.set_max_registers(232, action="increase")
            plgpu.copy_gmem_to_smem(v_ref.at[key_slice(v_ref, x, here)], v_smem, v_ready)
            plgpu.barrier_wait(v_ready)

            def one_step(step, dk):  # type: ignore[no-untyped-def]
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[slot])
                d_weights = product(v_smem, do_smem.at[slot].transpose((1, 0)), shape)
                d_weights = d_weights - along(load(row_smem.at[slot, 1]), shape, 1)
                plgpu.barrier_wait(made.at[slot])
                weights = plgpu.load(p_smem.at[slot], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                d_scores = (weights * d_weights * scale).astype(dtype)
                dk = add_product(dk, d_scores, q_smem.at[slot], ds_smem, tuning.registers)
                plgpu.barrier_arrive(free.at[slot])
                return dk

            dk = lax.fori_loop(0, steps, one_step, zeros((ROWS, key_dim)))
            dk_ref[key_slice(dk_ref, x, here)] = dk.astype(dtype)

        @pl.when(wg == 2)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def one_step(step) -> None:  # type: ignore[no-untyped-def]
                slot = lax.rem(step, stages)
                tile = plan_refs[1][x, start + step] if listed else start + step
                rows = pl.ds(tile * ROWS, ROWS)
                pl.when(step >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                q_place.load(q_ref, x, tile * ROWS, q_smem.at[slot], full.at[slot])
                out_place.load(do_ref, x, tile * ROWS, do_smem.at[slot], full.at[slot])
                copies = [
                    (lse_ref.at[x, rows], row_smem.at[slot, 0]),
                    (shift_ref.at[x, rows], row_smem.at[slot, 1]),
                    (first_ref.at[batch, rows], number_smem.at[slot, 0]),
                    (end_ref.at[batch, rows], number_smem.at[slot, 1]),
                ]
                if gated:
                    copies.append((gate_ref.at[x, rows], row_smem.at[slot, 2]))
                for source, target in copies:
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot])

            for slot in range(stages):  # every barrier is waited for as often as it completes
                pl.when(steps > slot)(partial(plgpu.barrier_wait, free.at[slot]))

    smem: Any = (
        swizzled((ROWS, key_dim), dtype),
        swizzled((ROWS, value_dim), dtype),
        swizzled((stages, ROWS, key_dim), dtype),
        swizzled((stages, ROWS, value_dim), dtype),
        plgpu.SMEM((stages, 3, ROWS), jnp.float32),
        plgpu.SMEM((stages, 2, ROWS), jnp.int32),
        plgpu.SMEM((ROWS,), jnp.int32) if listed else None,
        swizzled((stages, *shape), dtype),
        None if tuning.registers else swizzled(shape, dtype),
    )
    pieces = q_place.pieces(ROWS) + out_place.pieces(ROWS) + gated
    barriers = (
        plgpu.Barrier(num_arrivals=2 if listed else 1),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=4 + pieces, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    return plgpu.kernel(
        nsa_key_gradients,
        out_type=(jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        scratch_types=(smem, barriers),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(length // ROWS, groups),
        grid_names=("j", "x"),
        num_threads=3,
        thread_name="wg",
    )(
        saved.q,
        saved.d_out,
        saved.lse,
        saved.shift,
        *saved.visible,
        k,
        v,
        *plan_operands,
        *(() if saved.gate is None else (saved.gate,)),
    )
