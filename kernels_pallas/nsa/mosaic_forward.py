"""Forward kernel for Hopper: softmax attention of tiles of query rows to the tiles of keys that concern them.

Axis letters besides those of api.py: X batch and key/value heads, R rows (a row is one query of one head; the
heads of a group lie beside each other, so rows share their keys), P tiles of rows, U slots of a list.
One warpgroup loads keys and values, the others compute, each on 64 rows: the M of wgmma.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

ROWS = 64
LOG2_E = math.log2(math.e)
FLOOR = -1e30
"""Below every score; finite, so that differences with it are defined."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Static sizes of a kernel."""

    warpgroups: int = 2
    """That compute; each has its own 64 rows and all see the same keys."""
    keys: int = 64
    """In a tile."""
    stages: int = 2
    """Tiles of keys on their way or in use."""
    registers: bool = True
    """Probabilities go from registers into the second product. False puts them through shared memory, where
    Pallas' interpreter can follow."""

    @property
    def rows(self) -> int:
        """In a tile."""
        return self.warpgroups * ROWS


class Visible(NamedTuple):
    """Row r of batch b sees the keys with first[b, r] <= index < end[b, r]."""

    first: Int[Array, "B R"]
    end: Int[Array, "B R"]


class Ranges(NamedTuple):
    """Tile p of batch b reads the key tiles start <= j < end; all its rows see all of those from full_start
    to full_end. Packed in this order in the last axis."""

    bounds: Int[Array, "B P 4"]


class Lists(NamedTuple):
    """Tile p reads so many `steps` tiles of keys, `blocks` in ascending order; only the rows whose bit is in
    `members` see them."""

    steps: Int[Array, "X P"]
    blocks: Int[Array, "X P U"]
    members: Int[Array, "X P U"]
    row_bits: Int[Array, " rows"]
    """Bit of each row of a tile: that of its query."""
    warpgroup_bits: Int[Array, " warpgroups"]
    """Bits of the rows of each warpgroup, which skips the tiles that none of them sees."""


# References to memory, barriers and accumulators are Any: Pallas has no types for them that fit.
# mypy takes the transforms, whose bases are protocols, for abstract classes.
_TILING: Any = plgpu.TilingTransform
_SWIZZLE: Any = plgpu.SwizzleTransform


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """Shared memory for two-byte numbers that wgmma can read; the last axis is 32 or a multiple of 64."""
    width = min(shape[-1], 64)
    return plgpu.SMEM(shape, dtype, transforms=(_TILING((8, width)), _SWIZZLE(2 * width)))


def along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Broadcast a vector that belongs to one axis of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def product(a: Any, b: Any, shape: tuple[int, ...]) -> Array:
    """a @ b, both in shared memory, in float32."""

    def run(acc: Any) -> Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))  # type: ignore[arg-type]


def add_product(acc: Array, a: Array, b: Any, through: Any, registers: bool) -> Array:
    """acc + a @ b with `a` in registers, or through a piece of shared memory (see `Tuning.registers`)."""
    if registers:
        return pl.run_state(partial(plgpu.wgmma, a=a, b=b))(plgpu.ACC.init(acc))
    through[...] = a
    plgpu.commit_smem()
    return acc + product(through, b, acc.shape)


def vector(value: float, axis: int, size: int = ROWS) -> Array:
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(axis))


def zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


class Channel(NamedTuple):
    """What the loading warpgroup brings: slices of `source` into the slots of `target`."""

    source: Any
    target: Any
    full: Any
    """Barriers of the slots: something has come."""
    free: Any
    """Barriers of the slots: it was read."""


def serve(
    steps: Array,
    where: Callable[[Array], Sequence[tuple[Any, tuple[Any, ...]]]],
    channels: Sequence[Channel],
    stages: int,
) -> None:
    """The loading warpgroup's work: in step s, of each channel, the slices of the source that `where(s)`
    gives, with their places in the slot."""

    @pl.loop(0, steps)
    def one_step(step: Array) -> None:
        slot = lax.rem(step, stages)
        pieces = where(step)
        for channel in channels:
            pl.when(step >= stages)(partial(plgpu.barrier_wait, channel.free.at[slot]))
            for here, there in pieces:
                target = channel.target.at[(slot, *there)]
                plgpu.copy_gmem_to_smem(channel.source.at[here], target, channel.full.at[slot])

    for slot in range(stages):  # every barrier is waited for as often as it completes
        for channel in channels:
            pl.when(steps > slot)(partial(plgpu.barrier_wait, channel.free.at[slot]))


class Route(NamedTuple):
    """The steps of one tile of rows, as the kernels see them."""

    steps: Array
    key_tile: Callable[[Array], Array]
    phases: tuple[tuple[Any, Any, bool], ...]
    """(begin, end, whether some row does not see all of the keys)."""


def route(listed: bool, plan: Sequence[Any], x: Array, batch: Array, p: Array) -> Route:
    """Read a plan, Lists or Ranges."""
    if listed:
        steps = plan[0][x, p]
        return Route(steps, lambda step: plan[1][x, p, step], ((0, steps, True),))
    start, full_start, full_end, end = (plan[0][batch, p, i] for i in range(4))
    full_start, full_end, steps = full_start - start, full_end - start, end - start
    phases = ((0, full_start, True), (full_start, full_end, False), (full_end, steps, True))
    return Route(steps, lambda step: start + step, phases)


def visible_keys(first: Array, end: Array, tile: Array, shape: tuple[int, int], rows_axis: int) -> Array:
    """Mask of a tile of scores; `first` and `end` are vectors over the rows."""
    keys_axis = 1 - rows_axis
    index = plgpu.broadcasted_iota(jnp.int32, shape, keys_axis, layout=plgpu.Layout.WGMMA)
    index = index + tile * shape[keys_axis]
    return (index >= along(first, shape, rows_axis)) & (index < along(end, shape, rows_axis))


def go_through(
    way: Route,
    plan: Sequence[Any] | None,
    here: tuple[Array, Array, Array],
    channels: Sequence[Channel],
    stages: int,
    work: Callable[..., Any],
    carry: Any,
) -> Any:
    """A computing warpgroup's steps: carry = work(slot, step, carry, masked) for each.

    With the operands of a list in `plan`, it passes over the tiles that none of its rows sees; `here` is
    (x, tile of rows, warpgroup).
    """
    x, p, wg = here

    def one_step(step: Array, carry: Any, masked: bool) -> Any:
        slot = lax.rem(step, stages)
        if plan is None:
            return work(slot, step, carry, masked)

        def pass_over(carry: Any) -> Any:
            for channel in channels:
                plgpu.barrier_wait(channel.full.at[slot])
                plgpu.barrier_arrive(channel.free.at[slot])
            return carry

        concerned = (plan[2][x, p, step] & plan[4][wg]) != 0
        return lax.cond(concerned, lambda c: work(slot, step, c, masked), pass_over, carry)

    for begin, end, masked in way.phases:
        carry = lax.fori_loop(begin, end, partial(one_step, masked=masked), carry)
    return carry


def forward(
    q: Float[Array, "X R Dk"],
    k: Float[Array, "X S Dk"],
    v: Float[Array, "X S Dv"],
    visible: Visible,
    plan: Ranges | Lists,
    *,
    scale: float,
    tuning: Tuning,
) -> tuple[Float[Array, "X R Dv"], Float[Array, "X R"]]:
    """Output in the dtype of q, and the log-sum-exp in base 2, -inf for a row that sees nothing.

    bfloat16 or float16; R is a multiple of `tuning.rows`, S of `tuning.keys`, Dk and Dv of 64.
    """
    groups, rows, key_dim = q.shape
    value_dim, dtype = v.shape[2], q.dtype
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
            mine = pl.ds(p * tuning.rows + wg * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[x, mine], q_smem.at[wg], ready.at[wg])
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
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[x, mine])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[x, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == tuning.warpgroups)
        def memory() -> None:
            plgpu.set_max_registers(40, action="decrease")

            tile = lambda step: pl.ds(way.key_tile(step) * tuning.keys, tuning.keys)
            serve(way.steps, lambda step: [((x, tile(step)), ())], channels, stages)

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
        plgpu.Barrier(num_arrivals=4 if listed else 3, num_barriers=wgs),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )
    return plgpu.kernel(
        nsa_forward,
        out_type=(
            jax.ShapeDtypeStruct((groups, rows, value_dim), dtype),
            jax.ShapeDtypeStruct((groups, rows), jnp.float32),
        ),
        scratch_types=(smem, barriers),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(tiles, groups),
        grid_names=("p", "x"),
        num_threads=wgs + 1,
        thread_name="wg",
    )(q, k, v, *visible, *plan)
