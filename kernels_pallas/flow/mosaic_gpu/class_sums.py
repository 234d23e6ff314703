"""Kernel for Hopper: the flow into each token, by the class of the token that it comes from.

The attention of a tile is recomputed, times its gradient, head after head; the sum over heads stays in
registers until the last one, becomes absolute and is multiplied by the keys' classes as zeros and ones. What
is written is of size tokens times classes. No atomics: a program has its rows to itself.

Axis letters besides those of api.py: S tokens padded to whole tiles, C classes padded to COLUMNS.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import LOG2_E, ROWS, along, product, swizzled, visible_keys, zeros

COLUMNS = 64
"""Most token classes."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static facts of a call, and sizes of its tiles."""

    scale: float
    per_head: bool
    absolute: str
    """Of the sum over heads, of each head, or none: sum, heads, none."""
    warpgroups: int = 2
    """That compute, each with 64 rows of its own."""
    stages: int = 2
    registers: bool = True
    """Flows go from registers into the product with the classes; False: through shared memory, where Pallas'
    interpreter can follow."""

    @property
    def rows(self) -> int:
        """In a tile."""
        return self.warpgroups * ROWS


def row_class_sums(
    q: Float[Array, "B H S Dk"],
    d_out: Float[Array, "B H S Dv"],
    k: Float[Array, "B Hkv S Dk"],
    v: Float[Array, "B Hkv S Dv"],
    lse: Float[Array, "B H S"],
    first: Int[Array, "B S"],
    bounds: Int[Array, "B tiles 2"],
    one_hot: Float[Array, "B S C"],
    sizes: Sizes,
) -> Float[Array, "B *H S C"]:
    """Sums over the edges j < i, j >= first[i], by row i and class of j, float32.

    `lse` is in base 2, and 0 for rows that see nothing. A tile of rows reads the tiles of keys from its first
    bound to the second. S is a multiple of `sizes.rows`, Dk and Dv of 64.
    """
    batch, heads, length, key_dim = q.shape
    value_dim, dtype = v.shape[3], q.dtype
    share, wgs, stages = heads // k.shape[1], sizes.warpgroups, sizes.stages
    inner = 1 if sizes.per_head else heads
    shape = (ROWS, ROWS)

    def flow_class_sums(*refs):  # type: ignore[no-untyped-def]
        q_ref, do_ref, k_ref, v_ref, lse_ref, first_ref, bounds_ref, hot_ref, out_ref, smem, barriers = refs
        q_smem, do_smem, k_smem, v_smem, lse_smem, first_smem, hot_smem, through = smem
        ready, full, free, hot_full, hot_free = barriers
        x, p, wg = lax.axis_index("x"), lax.axis_index("p"), lax.axis_index("wg")
        b = lax.div(x, heads) if sizes.per_head else x
        begin, stop = bounds_ref[b, p, 0], bounds_ref[b, p, 1]
        head = lambda n: lax.rem(x, heads) if sizes.per_head else n
        rows_of = lambda w: pl.ds(p * sizes.rows + w * ROWS, ROWS)

        @pl.when(wg < wgs)
        def compute() -> None:
            plgpu.set_max_registers(232 if wgs == 2 else 240, action="increase")
            plgpu.copy_gmem_to_smem(first_ref.at[b, rows_of(wg)], first_smem.at[wg], ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            load = lambda ref: plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))
            own = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
            end = own + (p * sizes.rows + wg * ROWS)

            def one_tile(step, sums):  # type: ignore[no-untyped-def]
                tile = begin + step

                def one_head(n, flow):  # type: ignore[no-untyped-def]
                    slot = lax.rem(step * inner + n, stages)
                    plgpu.barrier_wait(full.at[slot])
                    scores = product(q_smem.at[slot, wg], k_smem.at[slot].transpose((1, 0)), shape)
                    scores = scores * (sizes.scale * LOG2_E)
                    seen = visible_keys(load(first_smem.at[wg]), end, tile, shape, 0)
                    scores = jnp.where(seen, scores, -jnp.inf)
                    weights = jnp.exp2(scores - along(load(lse_smem.at[slot, wg]), shape, 0))
                    d_weights = product(do_smem.at[slot, wg], v_smem.at[slot].transpose((1, 0)), shape)
                    plgpu.barrier_arrive(free.at[slot])
                    part = weights * d_weights
                    return flow + (jnp.abs(part) if sizes.absolute == "heads" else part)

                flow = lax.fori_loop(0, inner, one_head, zeros(shape))
                if sizes.absolute == "sum":
                    flow = jnp.abs(flow)
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(hot_full.at[slot])
                # Each flow enters as two numbers of 16 bits, together exact to 2^-16.
                coarse = flow.astype(dtype)
                fine = (flow - coarse.astype(jnp.float32)).astype(dtype)
                if sizes.registers:

                    def both(acc):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(acc, coarse, hot_smem.at[slot])
                        plgpu.wgmma(acc, fine, hot_smem.at[slot])

                    sums = pl.run_state(both)(plgpu.ACC.init(sums))
                else:
                    for piece in (coarse, fine):
                        through.at[wg][...] = piece
                        plgpu.commit_smem()
                        sums = sums + product(through.at[wg], hot_smem.at[slot], sums.shape)
                plgpu.barrier_arrive(hot_free.at[slot])
                return sums

            sums = lax.fori_loop(0, stop - begin, one_tile, zeros((ROWS, COLUMNS)))
            out_ref[x, rows_of(wg)] = sums

        @pl.when(wg == wgs)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")
            steps = (stop - begin) * inner

            @pl.loop(0, steps)
            def one_step(step) -> None:  # type: ignore[no-untyped-def]
                tile, n = lax.div(step, inner), head(lax.rem(step, inner))
                slot, hot_slot = lax.rem(step, stages), lax.rem(tile, stages)
                keys = pl.ds((begin + tile) * ROWS, ROWS)

                @pl.when(lax.rem(step, inner) == 0)
                def classes() -> None:
                    pl.when(tile >= stages)(partial(plgpu.barrier_wait, hot_free.at[hot_slot]))
                    plgpu.copy_gmem_to_smem(hot_ref.at[b, keys], hot_smem.at[hot_slot], hot_full.at[hot_slot])

                pl.when(step >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                group = lax.div(n, share)
                copies = [
                    (k_ref.at[b, group, keys], k_smem.at[slot]),
                    (v_ref.at[b, group, keys], v_smem.at[slot]),
                ]
                for w in range(wgs):
                    copies += [
                        (q_ref.at[b, n, rows_of(w)], q_smem.at[slot, w]),
                        (do_ref.at[b, n, rows_of(w)], do_smem.at[slot, w]),
                        (lse_ref.at[b, n, rows_of(w)], lse_smem.at[slot, w]),
                    ]
                for source, target in copies:
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot])

            for slot in range(stages):  # every barrier is waited for as often as it completes
                pl.when(steps > slot)(partial(plgpu.barrier_wait, free.at[slot]))
                pl.when(stop - begin > slot)(partial(plgpu.barrier_wait, hot_free.at[slot]))

    smem: Any = (
        swizzled((stages, wgs, ROWS, key_dim), dtype),
        swizzled((stages, wgs, ROWS, value_dim), dtype),
        swizzled((stages, ROWS, key_dim), dtype),
        swizzled((stages, ROWS, value_dim), dtype),
        plgpu.SMEM((stages, wgs, ROWS), jnp.float32),
        plgpu.SMEM((wgs, ROWS), jnp.int32),
        swizzled((stages, ROWS, COLUMNS), dtype),
        None if sizes.registers else swizzled((wgs, *shape), dtype),
    )
    barriers = (
        plgpu.Barrier(num_barriers=wgs),
        plgpu.Barrier(num_arrivals=2 + 3 * wgs, num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )
    programs = batch * heads if sizes.per_head else batch
    out = plgpu.kernel(
        flow_class_sums,
        out_type=jax.ShapeDtypeStruct((programs, length, COLUMNS), jnp.float32),
        scratch_types=(smem, barriers),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(length // sizes.rows, programs),
        grid_names=("p", "x"),
        num_threads=wgs + 1,
        thread_name="wg",
    )(q, d_out, k, v, lse, first, bounds, one_hot.astype(dtype))
    return out.reshape(batch, heads, length, COLUMNS) if sizes.per_head else out
