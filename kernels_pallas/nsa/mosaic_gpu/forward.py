"""Forward kernel for Hopper: softmax attention of tiles of query rows to the tiles of keys that concern them.

Axis letters as in common.py. One warpgroup loads keys and values, the others compute, each on 64 rows: the M
of wgmma.
"""

from typing import Any, NamedTuple

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
    by_rows,
    go_through,
    limits_in_tile,
    operands,
    ring,
    route,
    serve,
)
from kernels_pallas.nsa.mosaic_gpu.query_rows import Place, key_shape, key_slice, packed_rows, result_of

# References to memory, barriers and accumulators are Any: Pallas has no types for them that fit.
# mypy takes the transforms, whose bases are protocols, for abstract classes.


class Others(NamedTuple):
    """What is added to an output."""

    first: Array
    second: Array
    """Other outputs, where this one is."""
    gates: Float[Array, "3 X R"]
    """Factors of the first, the second and this one."""


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
    others: Others | None = None,
) -> tuple[Array, ...]:
    """Output in the dtype of q, and the log-sum-exp in base 2, -inf for a row that sees nothing.

    Queries and the output are where `places` say (None: packed, [X, R, D]), keys and values [X, S, D] or in
    place. With `others` a third result is their sum with this output, each times its gate. bfloat16 or
    float16; R is a multiple of `tuning.rows`, S of `tuning.keys`, Dk and Dv of 64.
    """
    groups, _, key_dim = key_shape(k)
    rows, value_dim, dtype = visible.first.shape[1], key_shape(v).dim, q.dtype
    packed = packed_rows(q)
    q_place, out_place = places or (packed, packed._replace(dim=value_dim))
    tiles, heads = rows // tuning.rows, groups // visible.first.shape[0]
    listed, summed = isinstance(plan, Lists), others is not None
    plan_operands = operands(plan)
    stages, shape = tuning.stages, (ROWS, tuning.keys)

    def nsa_forward(*all_refs):  # type: ignore[no-untyped-def]
        refs: Any = all_refs
        q_ref, k_ref, v_ref, first_ref, end_ref, *plan_refs = refs[: 5 + len(plan_operands)]
        refs = refs[5 + len(plan_operands) :]
        other_refs: Any = refs[:3] if summed else ()
        refs = refs[3:] if summed else refs
        out_ref, lse_ref, *refs = refs
        sum_ref, *refs = refs if summed else (None, *refs)
        smem, barriers = refs
        q_smem, k_smem, v_smem, p_smem, out_smem, lse_smem, first_smem, end_smem, bits_smem, *smem = smem
        other_smem, gate_smem = smem
        ready, k_full, v_full, k_free, v_free, others_ready = barriers
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
            if summed:  # the places of the two results are free until then
                out_place.load(other_refs[0], x, first_row, out_smem.at[wg], others_ready.at[wg])
                out_place.load(other_refs[1], x, first_row, other_smem.at[wg], others_ready.at[wg])
                for i in range(3):
                    source, target = other_refs[2].at[i, x, mine], gate_smem.at[wg, i]
                    plgpu.copy_gmem_to_smem(source, target, others_ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            load = lambda ref: plgpu.load(ref.at[wg], layout=plgpu.Layout.WGMMA.reduce(1))
            first, end = load(first_smem), load(end_smem)
            bits: Any = load(bits_smem) if listed else None

            def attend(slot, step, carry, masked):  # type: ignore[no-untyped-def]
                acc, top, total = carry
                plgpu.barrier_wait(k_full.at[slot])
                scores = product(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), shape)
                plgpu.barrier_arrive(k_free.at[slot])
                scores = scores * (scale * LOG2_E)
                if masked:
                    tile, (begin, limit) = way.key_tile(step), (first, end)
                    if listed:
                        tails = plan_refs[5][x, p, step] if len(plan_refs) > 5 else None
                        begin, limit = limits_in_tile(first, end, tile, bits, plan_refs[2][x, p, step], tails)
                    seen = visible_keys(begin, limit, tile, shape, 0)
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
            out = (acc / along(whole, acc.shape, 0)).astype(dtype)
            own_smem = other_smem if summed else out_smem
            if summed:
                plgpu.barrier_wait(others_ready.at[wg])
                column = plgpu.Layout.WGMMA.reduce(1)
                gate = lambda i: along(plgpu.load(gate_smem.at[wg, i], layout=column), acc.shape, 0)
                of_branch = lambda i, x: x.astype(jnp.float32) * gate(i)
                read = lambda ref: plgpu.load(ref.at[wg], layout=plgpu.Layout.WGMMA)
                together = of_branch(0, read(out_smem)) + of_branch(1, read(other_smem)) + of_branch(2, out)
                out_smem.at[wg][...] = together.astype(dtype)
            own_smem.at[wg][...] = out
            lse_smem.at[wg][...] = jnp.where(total > 0, top + jnp.log(whole) * LOG2_E, -jnp.inf)
            plgpu.commit_smem()
            out_place.store(own_smem.at[wg], out_ref, x, first_row)
            if summed:
                out_place.store(out_smem.at[wg], sum_ref, x, first_row)
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
        swizzled((wgs, ROWS, value_dim), dtype) if summed else None,
        plgpu.SMEM((wgs, 3, ROWS), jnp.float32) if summed else None,
    )
    (k_full, k_free), (v_full, v_free) = ring(stages, wgs), ring(stages, wgs)
    barriers = (
        plgpu.Barrier(num_arrivals=(3 if listed else 2) + q_place.pieces(ROWS), num_barriers=wgs),
        k_full,
        v_full,
        k_free,
        v_free,
        plgpu.Barrier(num_arrivals=3 + 2 * out_place.pieces(ROWS), num_barriers=wgs) if summed else None,
    )
    output = result_of(out_place, dtype)
    out_type = (
        output,
        jax.ShapeDtypeStruct((groups, rows), jnp.float32),
        *([output] if summed else []),
    )
    kernel = by_rows(nsa_forward, out_type, smem, barriers, tiles=tiles, groups=groups, warpgroups=wgs)
    return kernel(q, k, v, *visible, *plan_operands, *(() if others is None else others))
