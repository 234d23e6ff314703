"""Decode kernel for Hopper: a group's heads, one query each, over tiles of 64 keys as they lie in a cache.

The keys are the rows of the products and the heads their columns, so that 8 heads already fill them. Tiles
are read where they lie, in pages too, by the addresses of a plan; nothing is copied before. Programs share
the tiles of a sequence between them, and XLA joins what they found. Axis letters besides those of cache.py:
X batch and key/value heads, G heads of a group (padded), U tiles, A and C the two first axes of a kept array.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import LOG2_E, along, product, swizzled, vector
from kernels_pallas.nsa.base import NsaBranches, SelectionGrid, ceil_div, num_compressed, pad_axis
from kernels_pallas.nsa.decode_cache import Cache, PagedCache, Recent
from kernels_pallas.nsa.importance import ascending, block_importance, select_by_top_k
from kernels_pallas.nsa.mosaic_gpu.common import FLOOR, Channel, serve

KEYS = 64
"""In a tile: the M of wgmma."""
HEADS = 8
"""Groups are padded to a multiple of this: the N of wgmma."""
PROGRAMS = 264
"""Two for each multiprocessor of an H100: so far the tiles of a sequence are shared out."""
STAGES = 2
_SCRATCH = 4096
"""Bytes for reductions over keys, which the warps hold together."""


class Kept(NamedTuple):
    """One branch's keys and values in a cache, and what each X sees of them."""

    k: Float[Array, "A C Hkv Dk"]
    v: Float[Array, "A C Hkv Dv"]
    visible: Int[Array, " B"]
    """Entries that each sequence sees: its first ones."""
    pages: Int[Array, "B max_pages"] | None
    """Where its entries lie on the first axis, C after C; None: in a row of its own."""
    selected: Int[Array, "X n"] | None
    """Tiles that are read, in any order and different from each other; numbers outside of the sequence are
    missing ones. None: all."""
    tiles: int
    """That a sequence has at most."""

    def arrays(self) -> dict[str, Any]:
        """Operands of the kernel."""
        return {name: x for name, x in self._asdict().items() if name != "tiles" and x is not None}

    @property
    def steps(self) -> int:
        """At most."""
        return self.tiles if self.selected is None else self.selected.shape[1]

    @property
    def piece(self) -> int:
        """Entries that lie beside each other in every tile: a whole tile, or what a page has of it."""
        return KEYS if self.pages is None else math.gcd(self.k.shape[1], KEYS)


class _Place(NamedTuple):
    """Kept, as a program sees it."""

    refs: Any
    """Kept, with references for arrays."""
    static: Kept
    x: Array
    batch: Array

    def steps(self) -> Any:
        if self.static.selected is not None:
            return self.static.steps
        return lax.div(self.refs.visible[self.batch] + (KEYS - 1), KEYS)

    def tile(self, step: Array) -> tuple[Array, Array]:
        """Number of the tile that is read in a step, and how many of its keys are seen."""
        visible = self.refs.visible[self.batch]
        if self.static.selected is None:
            return step, jnp.minimum(visible - step * KEYS, KEYS)
        selected = self.refs.selected[self.x, step]
        there = (selected >= 0) & (selected < self.static.tiles)
        tile = jnp.where(there, selected, 0)
        return tile, jnp.where(there, jnp.clip(visible - tile * KEYS, 0, KEYS), 0)

    def pieces(self, step: Array, head: Array) -> list[tuple[Any, tuple[Any, ...]]]:
        """Slices of the kept arrays and their places in a slot, for `serve`."""
        tile, _ = self.tile(step)
        rows = self.static.piece
        count, size = KEYS // rows, self.static.k.shape[1] // rows
        found = []
        for i in range(count):
            outer, inner = self.batch, tile * count + i
            if self.static.pages is not None:
                # Of a page that is not there nothing is seen: what is read instead does not matter.
                page = jnp.minimum(lax.div(inner, size), self.static.pages.shape[1] - 1)
                outer = jnp.maximum(self.refs.pages[self.batch, page], 0)
                inner = lax.rem(inner, size)
            found.append(((outer, pl.ds(inner * rows, rows), head), (pl.ds(i * rows, rows),)))
        return found


class Found(NamedTuple):
    """Of each program: sums of values times weights, the base-2 scores' maximum and the sum of weights."""

    total: Float[Array, "X parts Dv G"]
    top: Float[Array, "X parts G"]
    weight: Float[Array, "X parts G"]


def shares(groups: int, branches: Sequence[Kept]) -> list[int]:
    """Programs among which the tiles of each X are split, for each branch."""
    wanted = ceil_div(PROGRAMS, groups)
    return [max(1, min(kept.steps, wanted // len(branches))) for kept in branches]


def attend_to_kept(
    q: Float[Array, "X G Dk"], branches: Sequence[Kept], *, scale: float, keep_scores: bool = False
) -> tuple[list[Found], Float[Array, "X keys G"] | None]:
    """Attention of every X to each branch by itself, in one launch.

    bfloat16 or float16, G a multiple of 8, Dk and Dv of 64. With `keep_scores` (of a single branch) also the
    base-2 scores of all keys of the tiles that are read; the others' are not written.
    """
    groups, heads, key_dim = q.shape
    value_dim, dtype = branches[0].v.shape[3], q.dtype
    kv_heads = branches[0].k.shape[2]
    parts = shares(groups, branches)
    operands = [x for kept in branches for x in kept.arrays().values()]
    shape = (KEYS, heads)

    def nsa_decode(*refs):  # type: ignore[no-untyped-def]
        q_ref, *kept_refs = refs[: 1 + len(operands)]
        total_ref, top_ref, weight_ref, *scores_ref, smem, barriers = refs[1 + len(operands) :]
        q_smem, k_smem, v_smem, p_smem = smem
        ready, k_full, v_full, k_free, v_free = barriers
        x, part, wg = lax.axis_index("x"), lax.axis_index("part"), lax.axis_index("wg")
        batch, head = lax.div(x, kv_heads), lax.rem(x, kv_heads)

        def one_branch(kept: Any, place: _Place, first_part: int, number: int) -> None:
            mine, most = part - first_part, place.steps()
            begin = lax.div(most * mine, number)
            steps = lax.div(most * (mine + 1), number) - begin
            channels = Channel(kept.k, k_smem, k_full, k_free), Channel(kept.v, v_smem, v_full, v_free)

            @pl.when(wg == 0)
            def compute() -> None:
                plgpu.copy_gmem_to_smem(q_ref.at[x], q_smem, ready)
                plgpu.barrier_wait(ready)

                def attend(step, carry):  # type: ignore[no-untyped-def]
                    acc, top, weight = carry
                    slot = lax.rem(step, STAGES)
                    tile, seen = place.tile(begin + step)
                    plgpu.barrier_wait(k_full.at[slot])
                    scores = product(k_smem.at[slot], q_smem.transpose((1, 0)), shape)
                    plgpu.barrier_arrive(k_free.at[slot])
                    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    scores = jnp.where(key < seen, scores * (scale * LOG2_E), -jnp.inf)
                    if keep_scores:
                        scores_ref[0][x, pl.ds(tile * KEYS, KEYS)] = scores
                    new_top = jnp.maximum(top, scores.max(axis=0))
                    fade = jnp.exp2(top - new_top)
                    weights = jnp.exp2(scores - along(new_top, shape, 1))
                    weight = weight * fade + weights.sum(axis=0)
                    p_smem.transpose((1, 0))[...] = weights.astype(dtype)
                    plgpu.barrier_wait(v_full.at[slot])
                    pl.when(seen < KEYS)(partial(_clear, v_smem.at[slot], seen))
                    plgpu.commit_smem()
                    values = product(v_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)), acc.shape)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc * along(fade, acc.shape, 1) + values, new_top, weight

                nothing = jnp.zeros((value_dim, heads), jnp.float32)
                carry = (
                    plgpu.layout_cast(nothing, plgpu.Layout.WGMMA),
                    vector(FLOOR, 0, heads),
                    vector(0.0, 0, heads),
                )
                acc, top, weight = lax.fori_loop(0, steps, attend, carry)
                total_ref[x, part], top_ref[x, part], weight_ref[x, part] = acc, top, weight

            @pl.when(wg == 1)
            def memory() -> None:
                serve(steps, lambda step: place.pieces(begin + step, head), channels, STAGES)

        first_part = 0
        left = iter(kept_refs)
        for static, number in zip(branches, parts, strict=True):
            kept = static._replace(**{name: next(left) for name in static.arrays()})
            inside = (part >= first_part) & (part < first_part + number)
            place = _Place(kept, static, x, batch)
            pl.when(inside)(partial(one_branch, kept, place, first_part, number))
            first_part += number

    pieces = {KEYS // kept.piece for kept in branches}
    if len(pieces) > 1:
        raise ValueError(f"branches of one launch must have as many pieces a tile, not {pieces}")
    ring = partial(plgpu.Barrier, num_barriers=STAGES)
    full = partial(ring, num_arrivals=pieces.pop())
    outputs = [
        jax.ShapeDtypeStruct((groups, sum(parts), value_dim, heads), jnp.float32),
        *[jax.ShapeDtypeStruct((groups, sum(parts), heads), jnp.float32)] * 2,
    ]
    if keep_scores:
        outputs.append(jax.ShapeDtypeStruct((groups, branches[0].tiles * KEYS, heads), jnp.float32))
    smem: Any = (
        swizzled((heads, key_dim), dtype),
        swizzled((STAGES, KEYS, key_dim), dtype),
        swizzled((STAGES, KEYS, value_dim), dtype),
        swizzled((heads, KEYS), dtype),
    )
    total, top, weight, *scores = plgpu.kernel(
        nsa_decode,
        out_type=tuple(outputs),
        scratch_types=(smem, (plgpu.Barrier(), full(), full(), ring(), ring())),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=_SCRATCH),
        grid=(sum(parts), groups),
        grid_names=("part", "x"),
        num_threads=2,
        thread_name="wg",
    )(q, *operands)
    found, at = [], 0
    for number in parts:
        found.append(Found(*(y[:, at : at + number] for y in (total, top, weight))))
        at += number
    return found, scores[0] if keep_scores else None


def _clear(values: Any, seen: Array) -> None:
    """Zeros for the values of keys that are not seen: a weight of 0 does not stop a NaN."""
    for start in range(0, values.shape[1], KEYS):  # by parts, to take fewer registers
        part = values.at[:, pl.ds(start, KEYS)]
        tile = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(key < seen, tile, jnp.zeros_like(tile))


def join(found: Found) -> tuple[Float[Array, "X G Dv"], Float[Array, "X G"]]:
    """Output in float32 and the log-sum-exp in base 2 of what all programs found; 0 and -inf for nothing."""
    top = jnp.max(found.top, axis=1)
    fade = jnp.exp2(found.top - top[:, None])
    weight = jnp.sum(found.weight * fade, axis=1)
    whole = jnp.where(weight > 0, weight, 1.0)
    total = jnp.sum(found.total * fade[:, :, None], axis=1) / whole[:, None]
    lse = jnp.where(weight > 0, top + jnp.log2(whole), -jnp.inf)
    return jnp.moveaxis(total, 2, 1), lse


def decode_token(
    grid: SelectionGrid,
    cache: Cache,
    recent: Recent,
    q: Float[Array, "B 1 H Dk"],
    window: int,
    indices: Int[Array, "B Hkv 1 n"] | None,
) -> NsaBranches:
    """See `Operators.decode_token`: two launches, the selection of blocks between them."""
    batch, _, heads, dim = q.shape
    kv_heads = cache.k_slc.shape[2]
    group = heads // kv_heads
    position = jnp.where(recent.num_new > 0, cache.length - 1, -1)
    rows = pad_axis(q.reshape(batch * kv_heads, group, dim), 1, HEADS)
    pages = cache.page_table if isinstance(cache, PagedCache) else None

    blocks = num_compressed(grid.kv_len, grid.block_len, grid.stride)
    visible = jnp.clip((position + 1 - grid.block_len) // grid.stride + 1, 0, blocks)
    kept = Kept(cache.k_cmp, cache.v_cmp, visible, pages, None, max(1, ceil_div(blocks, KEYS)))
    (found,), scores = attend_to_kept(rows, [kept], scale=grid.scale, keep_scores=indices is None)
    compressed, lse = join(found)
    if scores is not None:
        seen = jnp.arange(scores.shape[1], dtype=jnp.int32)[None] < jnp.repeat(visible, kv_heads)[:, None]
        weights = jnp.where(seen[..., None], jnp.exp2(scores - lse[:, None]), 0.0)
        shares = jnp.sum(weights[..., :group], axis=-1).reshape(batch, kv_heads, 1, -1)
        newest = (position // grid.block_size)[:, None]
        selected = select_by_top_k(grid, block_importance(grid, shares), newest)
        indices = ascending(selected)
    else:
        assert indices is not None
        selected = indices

    parts = grid.block_size // KEYS
    part = jnp.arange(parts, dtype=jnp.int32)[None, None]
    tiles = (selected.reshape(batch * kv_heads, -1, 1) * parts + part).reshape(batch * kv_heads, -1)
    present, ring = position + 1, cache.k_win.shape[1]
    branches = [
        Kept(cache.k_slc, cache.v_slc, present, pages, tiles, grid.kv_len // KEYS),
        Kept(cache.k_win, cache.v_win, jnp.minimum(present, ring), None, None, ring // KEYS),
    ]
    (of_blocks, of_window), _ = attend_to_kept(rows, branches, scale=grid.scale)

    def finish(out: Float[Array, "X G Dv"]) -> Float[Array, "B 1 H Dv"]:
        return out[:, :group].astype(q.dtype).reshape(batch, 1, heads, -1)

    outs = [finish(out) for out in (compressed, join(of_blocks)[0], join(of_window)[0])]
    natural = (lse[:, :group] / LOG2_E).reshape(batch, 1, heads)
    return NsaBranches(outs[0], outs[1], outs[2], natural, indices)
