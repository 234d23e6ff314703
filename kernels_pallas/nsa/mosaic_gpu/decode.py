"""Decode kernel for Hopper: a group's heads, one query each, over tiles of 64 keys as they lie in a cache.

The keys are the rows of the products and the heads their columns, so that 8 heads already fill them. Tiles
are read where they lie, in pages too, by the addresses of a plan; nothing is copied before. Programs share
the tiles of a sequence between them; decode_joined.py selects from what they found and joins it. Axis letters
besides those of cache.py: X batch and key/value heads, G heads of a group (padded), U tiles, A and C the two
first axes of a kept array.
"""

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

from kernels_pallas.hopper import LOG2_E, along, product, swizzled, vector
from kernels_pallas.nsa.base import NsaBranches, SelectionGrid, ceil_div, num_compressed, pad_axis
from kernels_pallas.nsa.decode_cache import Cache, PagedCache, Recent
from kernels_pallas.nsa.importance import ascending, block_importance, select_by_top_k
from kernels_pallas.nsa.mosaic_gpu.common import FLOOR, Channel, serve
from kernels_pallas.nsa.mosaic_gpu.decode_joined import Partial, join_and_gate, select_tiles, stretches

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
    pages: Int[Array, "B max_pages"] | None
    """Where its entries lie on the first axis, C after C; None: in a row of its own."""
    selected: Int[Array, "X slots"] | None
    """Tiles that are read, in any order and different from each other; numbers outside of the sequence are
    missing ones. None: all."""
    tiles: int
    """That a sequence has at most, or of `selected` the slots that are read."""
    sees: Callable[[Any], Any]
    """Tokens of a sequence -> entries that its newest one sees: the first ones."""

    def arrays(self) -> dict[str, Any]:
        """Operands of the kernel."""
        names = ("k", "v", "pages", "selected")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

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
    visible: Array

    def steps(self) -> Any:
        if self.static.selected is not None:
            return self.static.tiles
        return lax.div(self.visible + (KEYS - 1), KEYS)

    def tile(self, step: Array) -> tuple[Array, Array]:
        """Number of the tile that is read in a step, and how many of its keys are seen."""
        if self.static.selected is None:
            return step, jnp.minimum(self.visible - step * KEYS, KEYS)
        selected = self.refs.selected[self.x, step]
        there = (selected >= 0) & (selected < lax.div(self.visible + (KEYS - 1), KEYS))
        tile = jnp.where(there, selected, 0)
        return tile, jnp.where(there, jnp.clip(self.visible - tile * KEYS, 0, KEYS), 0)

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


def shares(groups: int, branches: Sequence[Kept]) -> list[int]:
    """Programs among which the tiles of each X are split, for each branch."""
    wanted = ceil_div(PROGRAMS, groups)
    return [max(1, min(kept.tiles, wanted // len(branches))) for kept in branches]


def attend_to_kept(
    q: Float[Array, "X G Dk"],
    branches: Sequence[Kept],
    length: Int[Array, " B"],
    num_new: Int[Array, " B"],
    *,
    scale: float,
    keep_scores: bool = False,
) -> tuple[list[Partial], Float[Array, "X keys G"] | None]:
    """Attention of every X to each branch by itself, in one launch; none for sequences without new token.

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
        q_ref, length_ref, new_ref, *kept_refs = refs[: 3 + len(operands)]
        total_ref, top_ref, weight_ref, *scores_ref, smem, barriers = refs[3 + len(operands) :]
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

        present = jnp.where(new_ref[batch] > 0, length_ref[batch], 0)
        first_part = 0
        left = iter(kept_refs)
        for static, number in zip(branches, parts, strict=True):
            kept = static._replace(**{name: next(left) for name in static.arrays()})
            inside = (part >= first_part) & (part < first_part + number)
            place = _Place(kept, static, x, batch, static.sees(present))
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
    )(q, length, num_new, *operands)
    found, at = [], 0
    for number in parts:
        found.append(Partial(total, top, weight, at, at + number))
        at += number
    return found, scores[0] if keep_scores else None


def _clear(values: Any, seen: Array) -> None:
    """Zeros for the values of keys that are not seen: a weight of 0 does not stop a NaN."""
    for start in range(0, values.shape[1], KEYS):  # by parts, to take fewer registers
        part = values.at[:, pl.ds(start, KEYS)]
        tile = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(key < seen, tile, jnp.zeros_like(tile))


def decode_token(
    grid: SelectionGrid,
    cache: Cache,
    recent: Recent,
    q: Float[Array, "B 1 H Dk"],
    gates: Float[Array, "B 1 H 3"],
    window: int,
    indices: Int[Array, "B Hkv 1 n"] | None,
) -> tuple[Float[Array, "B 1 H Dv"], NsaBranches]:
    """See `Operators.decode_token`: four launches, attention to compressed keys, selection of blocks,
    attention to those and the window, and the join of it all."""
    batch, _, heads, dim = q.shape
    kv_heads, ring = cache.k_slc.shape[2], cache.k_win.shape[1]
    group = heads // kv_heads
    rows = pad_axis(q.reshape(batch * kv_heads, group, dim), 1, HEADS)
    pages = cache.page_table if isinstance(cache, PagedCache) else None
    attend = partial(attend_to_kept, rows, length=cache.length, num_new=recent.num_new, scale=grid.scale)

    blocks = num_compressed(grid.kv_len, grid.block_len, grid.stride)

    def complete(present: Any) -> Any:
        count = lax.div(jnp.maximum(present - grid.block_len, 0), grid.stride) + 1
        return jnp.where(present >= grid.block_len, jnp.minimum(count, blocks), 0)

    kept = Kept(cache.k_cmp, cache.v_cmp, pages, None, max(1, ceil_div(blocks, KEYS)), complete)
    (compressed,), scores = attend([kept], keep_scores=indices is None)
    slots = grid.num_blocks
    if scores is None:
        assert indices is not None
        slots, tiles = _tiles_of(grid, indices)
    elif (cut := stretches(grid, scores.shape[1])) is not None:
        tiles = select_tiles(scores, compressed, group, cache.length, recent.num_new, grid, cut)
        indices = ascending(tiles[:, :slots]).reshape(batch, kv_heads, 1, slots)
    else:
        present = jnp.where(recent.num_new > 0, cache.length, 0)
        indices = _select(grid, scores, compressed, present, group)
        slots, tiles = _tiles_of(grid, indices)
    branches = [
        Kept(cache.k_slc, cache.v_slc, pages, tiles, slots, lambda present: present),
        Kept(cache.k_win, cache.v_win, None, None, ring // KEYS, lambda present: jnp.minimum(present, ring)),
    ]
    (of_blocks, of_window), _ = attend(branches)
    of_heads = gates.reshape(batch * kv_heads, group, 3)
    joined = join_and_gate((compressed, of_blocks, of_window), of_heads, recent.num_new, q.dtype)
    as_output = lambda x: x[:, :group].reshape(batch, 1, heads, -1)
    outs = [as_output(joined.branches[:, i]) for i in range(3)]
    lse = joined.lse[:, :group].reshape(batch, 1, heads)
    return as_output(joined.out), NsaBranches(outs[0], outs[1], outs[2], lse, indices)


def _tiles_of(grid: SelectionGrid, indices: Int[Array, "B Hkv 1 n"]) -> tuple[int, Int[Array, "X slots"]]:
    """Tiles of selected blocks, and their number."""
    parts = grid.block_size // KEYS
    part = jnp.arange(parts, dtype=jnp.int32)[None, None]
    rows = indices.shape[0] * indices.shape[1]
    tiles = (indices.reshape(rows, -1, 1) * parts + part).reshape(rows, -1)
    return tiles.shape[1], tiles


def _select(
    grid: SelectionGrid,
    scores: Float[Array, "X keys G"],
    found: Partial,
    present: Int[Array, " B"],
    group: int,
) -> Int[Array, "B Hkv 1 n"]:
    """By XLA, for blocks that `select_tiles` cannot do."""
    batch = present.shape[0]
    top, weight = (x[:, found.first : found.end] for x in (found.top, found.weight))
    most = jnp.max(top, axis=1)
    total = jnp.sum(weight * jnp.exp2(top - most[:, None]), axis=1)
    lse = most + jnp.log2(jnp.where(total > 0, total, 1.0))
    complete = (present - grid.block_len) // grid.stride + 1
    visible = jnp.repeat(jnp.maximum(complete, 0), scores.shape[0] // batch)
    seen = jnp.arange(scores.shape[1], dtype=jnp.int32)[None] < visible[:, None]
    weights = jnp.where(seen[..., None], jnp.exp2(scores - lse[:, None]), 0.0)
    shares = jnp.sum(weights[..., :group], axis=-1).reshape(batch, -1, 1, scores.shape[1])
    newest = ((present - 1) // grid.block_size)[:, None]
    return ascending(select_by_top_k(grid, block_importance(grid, shares), newest))
