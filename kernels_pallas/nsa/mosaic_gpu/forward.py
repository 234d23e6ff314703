"""Forward kernel for Hopper: softmax attention of tiles of query rows to the tiles of keys that concern them.

Axis letters as in common.py. One warpgroup loads keys and values, the others compute, each on 64 rows: the M
of wgmma.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.hopper import (
    LOG2_E,
    ROWS,
    add_product,
    along,
    product,
    swizzled,
    vector,
    visible_keys,
    zeros,
)
from kernels_pallas.nsa.mosaic_gpu.common import (
    FLOOR,
    Channel,
    Lists,
    Ranges,
    Tuning,
    Visible,
    go_through,
    route,
    serve,
)
from kernels_pallas.nsa.mosaic_gpu.query_rows import Place, key_shape, key_slice, packed_rows, result_of

# References to memory, barriers and accumulators are Any: Pallas has no types for them that fit.
# mypy takes the transforms, whose bases are protocols, for abstract classes.


def forward_pass(
    q: Array,
    k: Array,
    v: Array,
    visible: Visible,
    plan: Ranges | Lists,
    *,
    scale: float,
    tuning: Tuning,
    places: tuple[Place, Place] | None = None,
) -> tuple[Array, Float[Array, "X R"]]:
    """Output in the dtype of q, and the log-sum-exp in base 2, -inf for a row that sees nothing.

    Queries and the output are where `places` say (None: packed, [X, R, D]), keys and values [X, S, D] or in
    place. bfloat16 or float16; R is a multiple of `tuning.rows`, S of `tuning.keys`, Dk and Dv of 64.
    """
    groups, _, key_dim = key_shape(k)
    rows, value_dim, dtype = visible.first.shape[1], key_shape(v).dim, q.dtype
    packed = packed_rows(q)
    q_place, out_place = places or (packed, packed._replace(dim=value_dim))
    tiles, heads = rows // tuning.rows, groups // visible.first.shape[0]
    listed = isinstance(plan, Lists)
    stages, shape = tuning.stages, (ROWS, tuning.keys)

    def nsa_forward(*refs):  # type: ignore[no-untyped-def]
        q_ref, k_ref, v_ref, first_ref, end_ref, *plan_refs = refs[: 5 + len(plan)]
        out_ref, lse_ref = refs[5 + len(plan) : 7 + len(plan)]
        smem, barriers = refs[7 + len(plan) :]
        q_smem, k_smem, v_smem, p_smem, out_smem, lse_smem, first_smem, end_smem, bits_smem = smem
        ready, k_full, v_full, k_free, v_free = barriers
        x, p, wg = lax.axis_index("x"), lax.axis_index("p"), lax.axis_index("wg")
        batch = lax.div(x, heads)
        way = route(listed, plan_refs, x, batch, p)
        channels = Channel(k_ref, k_smem, k_full, k_free), Channel(v_ref, v_smem, v_full, v_free)

        @pl.when(wg < tuning.warpgroups)
        def compute() -> None:
            plgpu.set_max_registers(232 if tuning.warpgroups == 2 else 240, action="increase")
            first_row = p * tuning.rows + wg * ROWS
            mine = pl.ds(first_row, ROWS)
            q_place.load(q_ref, x, first_row, q_smem.at[wg], ready.at[wg])
            plgpu.copy_gmem_to_smem(first_ref.at[batch, mine], first_smem.at[wg], ready.at[wg])
            plgpu.copy_gmem_to_smem(end_ref.at[batch, mine], end_smem.at[wg], ready.at[wg])
            if listed:
                here = pl.ds(wg * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(plan_refs[3].at[here], bits_smem.at[wg], ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            load = lambda ref: plgpu.load(ref.at[wg], layout=plgpu.Layout.WGMMA.reduce(1))
            first, end = load(first_smem), load(end_smem)
            bits = load(bits_smem) if listed else None

            def attend(slot, step, carry, masked):  # type: ignore[no-untyped-def]
                acc, top, total = carry
                plgpu.barrier_wait(k_full.at[slot])
                scores = product(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), shape)
                plgpu.barrier_arrive(k_free.at[slot])
                scores = scores * (scale * LOG2_E)
                if masked:
                    limit = end
                    if listed:
                        limit = jnp.where((bits & plan_refs[2][x, p, step]) != 0, end, 0)
                    seen = visible_keys(first, limit, way.key_tile(step), shape, 0)
                    scores = jnp.where(seen, scores, -jnp.inf)
                new_top = jnp.maximum(top, scores.max(axis=1))
                fade = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - along(new_top, shape, 0))
                total = total * fade + weights.sum(axis=1)
                acc = acc * along(fade, acc.shape, 0)
                plgpu.barrier_wait(v_full.at[slot])
                through = None if tuning.registers else p_smem.at[wg]
                acc = add_product(acc, weights.astype(dtype), v_smem.at[slot], through, tuning.registers)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_top, total

            carry = zeros((ROWS, value_dim)), vector(FLOOR, 1), vector(0.0, 1)
            listing = plan_refs if listed else None
            carry = go_through(way, listing, (x, p, wg), channels, stages, attend, carry)
            acc, top, total = carry
            whole = jnp.where(total > 0, total, 1.0)
            out_smem.at[wg][...] = (acc / along(whole, acc.shape, 0)).astype(dtype)
            lse_smem.at[wg][...] = jnp.where(total > 0, top + jnp.log(whole) * LOG2_E, -jnp.inf)
            plgpu.commit_smem()
            out_place.store(out_smem.at[wg], out_ref, x, first_row)
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[x, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == tuning.warpgroups)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")

            tile = lambda step: pl.ds(way.key_tile(step) * tuning.keys, tuning.keys)
            serve(way.steps, lambda step: [(key_slice(k_ref, x, tile(step)), ())], channels, stages)

    wgs = tuning.warpgroups
    each = lambda dtype: plgpu.SMEM((wgs, ROWS), dtype)
    smem: Any = (
        swizzled((wgs, ROWS, key_dim), dtype),
        swizzled((stages, tuning.keys, key_dim), dtype),
        swizzled((stages, tuning.keys, value_dim), dtype),
        None if tuning.registers else swizzled((wgs, *shape), dtype),
        swizzled((wgs, ROWS, value_dim), dtype),
        each(jnp.float32),
        each(jnp.int32),
        each(jnp.int32),
        each(jnp.int32) if listed else None,
    )
    barriers = (
        plgpu.Barrier(num_arrivals=(3 if listed else 2) + q_place.pieces(ROWS), num_barriers=wgs),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )
    return plgpu.kernel(
        nsa_forward,
        out_type=(
            result_of(out_place, dtype),
            jax.ShapeDtypeStruct((groups, rows), jnp.float32),
        ),
        scratch_types=(smem, barriers),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(tiles, groups),
        grid_names=("p", "x"),
        num_threads=wgs + 1,
        thread_name="wg",
    )(q, k, v, *visible, *plan)
