"""The vocabulary of the Hopper kernels: tile sizes, plans, products, masks, and the ring that loads tiles.

Axis letters besides those of api.py: X batch and key/value heads, R rows (a row is one query of one head; the
heads of a group lie beside each other, so rows share their keys), P tiles of rows, U slots of a list.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import (
    ROWS,
)

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
    `members` or `tails` see them.

    Where texts are packed, a block may begin within a tile of keys and end in the next one. Then a row of
    `members` sees the part from where a block of its text begins, and one of `tails` the part before: a copy
    from anywhere else than a multiple of 8 rows is none that TMA could make into a swizzled tile.
    """

    steps: Int[Array, "X P"]
    blocks: Int[Array, "X P U"]
    members: Int[Array, "X P U"]
    row_bits: Int[Array, " rows"]
    """Bit of each row of a tile: that of its query."""
    warpgroup_bits: Int[Array, " warpgroups"]
    """Bits of the rows of each warpgroup, which skips the tiles that none of them sees."""
    tails: Int[Array, "X P U"] | None = None
    """None: every block is a tile."""


class Inverse(NamedTuple):
    """Tiles of rows that read each block: those from start[x, j] to start[x, j + 1] in `tiles`."""

    start: Int[Array, "X blocks+1"]
    tiles: Int[Array, "X E"]
    members: Int[Array, "X E"]
    tails: Int[Array, "X E"] | None = None


class Saved(NamedTuple):
    """What both kernels read of the rows."""

    q: Array
    d_out: Array
    lse: Float[Array, "X R"]
    """In base 2; 0 for rows that see nothing."""
    shift: Float[Array, "X R"]
    """Sum of d_out * out, less the gradient of the natural log-sum-exp."""
    visible: Visible
    places: Any = None
    """query_rows.Place of q and of d_out; None: both packed, [X, R, D]."""
    gate: Float[Array, "X R"] | None = None
    """What the output is multiplied by; None: 1. `shift` is then of the output without it."""


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


def ring(stages: int, readers: int) -> tuple[plgpu.Barrier, plgpu.Barrier]:
    """The barriers of a channel's slots, full and free, for so many warpgroups that read them."""
    return plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=readers, num_barriers=stages)


def by_rows(
    kernel: Any, out_type: Any, smem: Any, barriers: Any, *, tiles: int, groups: int, warpgroups: int
) -> Any:
    """The kernel with a program for each tile p of rows and each group x, whose warpgroups wg compute and one
    more loads."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=(smem, barriers),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(tiles, groups),
        grid_names=("p", "x"),
        num_threads=warpgroups + 1,
        thread_name="wg",
    )


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


def operands(plan: Sequence[Any]) -> list[Any]:
    """Arrays of a plan, for a kernel."""
    return [x for x in plan if x is not None]


def limits_in_tile(
    first: Array, end: Array, tile: Array, bits: Any, members: Array, tails: Array | None
) -> tuple[Array, Array]:
    """First key and end of what rows with `bits` see of a tile that lists share (see `Lists`); `first` and
    `end` bound what they see at all, and `first` is where their text begins."""
    heads = (bits & members) != 0
    if tails is None:
        return first, jnp.where(heads, end, 0)
    before = (bits & tails) != 0
    begins = tile * ROWS + (first & (ROWS - 1))
    first = jnp.where(before, first, jnp.maximum(first, begins))
    end = jnp.where(heads, end, jnp.where(before, jnp.minimum(end, begins), 0))
    return first, end


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

        members = plan[2][x, p, step]
        if len(plan) > 5:
            members = members | plan[5][x, p, step]
        concerned = (members & plan[4][wg]) != 0
        return lax.cond(concerned, lambda c: work(slot, step, c, masked), pass_over, carry)

    for begin, end, masked in way.phases:
        carry = lax.fori_loop(begin, end, partial(one_step, masked=masked), carry)
    return carry
