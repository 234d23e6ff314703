"""Attention of each query over the blocks that were selected for its GQA group.

Pairs (query, block) of one chunk of queries are sorted by block and cut into tiles of pairs that share their
block (query_block_pairs.py). Block j is named by j, or in packed rows, where the blocks of a text begin
anywhere, by the row at which it begins. A tile is one small matrix product: the block's keys are read once
for all pairs of the tile instead of once for every pair, and the gradients of keys and values are summed
within a tile before they are added to the block. Memory per chunk is (queries x n) partial results; chunks
shrink as heads and n grow.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import (
    Block,
    Positions,
    Residuals,
    accumulator,
    ceil_div,
    dot_outputs,
    finite,
    heads_first,
    named,
    power_of_two_at_most,
    selected_rows,
    softmax_floor,
    where_finite,
    without_nan,
)
from kernels_pallas.nsa.xla.query_block_pairs import Plan, Sizes, plan_pairs
from kernels_pallas.nsa.xla.tiling import (
    for_each_head,
    from_chunks,
    merge,
    query_chunk,
    split,
    take_rows,
    tile_elements,
    to_chunks,
    transposed,
)

# Elements of the partial results of one chunk (all pairs, all heads of the group).
PARTIAL_ELEMENTS = 1 << 23


class _Names(NamedTuple):
    """How blocks are named, static."""

    unit: int
    """Block n begins at row n * unit."""
    end: int
    """Names are below this."""


def _names(block: Block, k: Array, positions: Positions) -> _Names:
    if positions.key_segments is None:
        return _Names(block.size, ceil_div(k.shape[1], block.size))
    return _Names(1, k.shape[1])


class _Sizes(NamedTuple):
    """Static sizes: those of the pairs, and how many blocks one chunk of queries can select at most."""

    plan: Sizes
    blocks: int


def _sizes(q: Array, v: Array, block: Block, names: _Names, selected: int) -> _Sizes:
    batch, length, kv_heads, groups, dim = q.shape
    rows = batch * kv_heads
    width = max(dim, v.shape[-1])
    queries = query_chunk(length, rows * selected * groups * width, budget=PARTIAL_ELEMENTS)
    blocks = ceil_div(names.end * names.unit, block.size)
    if names.unit == 1:
        # Each text has at most one block more than its length asks for, and queries are of as many texts as
        # there are queries.
        blocks += queries
    else:
        queries = min(queries, max(1, np.iinfo(np.int32).max // ((blocks + 1) * selected)))
    per_block = ceil_div(queries * selected, blocks)
    pairs = power_of_two_at_most(min(max(per_block // 2, 128 // groups, 1), max(1, 512 // groups)))
    pairs = min(pairs, power_of_two_at_most(queries))
    blocks = min(blocks, queries * selected)
    tiles = queries * selected // pairs + blocks
    step = min(max(1, tile_elements() // (rows * pairs * groups * block.size)), tiles)
    return _Sizes(Sizes(queries, pairs, step, ceil_div(tiles, step) * step), blocks)


class _Chunk(NamedTuple):
    """The query side of one chunk."""

    names: Int[Array, "B Hkv C n"]
    """Of the selected blocks, -1 for missing slots."""
    newest: Int[Array, "B C"]
    """The last token that a query sees."""


def _chunks(block: Block, names: _Names, size: int, indices: Array, positions: Positions) -> _Chunk:
    rows = selected_rows(indices, positions, block.size)
    named = jnp.where(rows < 0, -1, rows // names.unit)
    chunks = jnp.moveaxis(to_chunks(named, size, fill=-1), 3, 2)
    return _Chunk(chunks, to_chunks(positions.q_positions, size))


class _Step(NamedTuple):
    """What one step of the loop works on: X tiles, each of one block and P pairs.

    A pair has a row for each of the group's G heads.
    """

    start: Int[Array, "B Hkv X"]
    """Row at which the block begins."""
    query: Int[Array, "B Hkv X P"]
    keys: Float[Array, "B Hkv X size Dk"]
    values: Float[Array, "B Hkv X size Dv"]
    queries: Float[Array, "B Hkv X rows Dk"]
    scores: Float[Array, "B Hkv X rows size"]


def _step(
    block: Block,
    unit: int,
    sizes: Sizes,
    plan: Plan,
    data: "_Data",
    q_chunk: Array,
    here: _Chunk,
    step: Array,
) -> _Step:
    """Gather the tiles of one step and compute their masked scores."""

    def cut(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, step * sizes.step, sizes.step, axis=2)

    start, pair, valid = cut(plan.tile_block) * unit, cut(plan.tile_pair), cut(plan.tile_valid)
    query = pair // here.names.shape[3]
    keys, values = _take_windows(data.keys, start, block.size), _take_windows(data.values, start, block.size)
    queries = _rows_of(q_chunk, query)
    scores = jnp.einsum(
        "bhxrd,bhxsd->bhxrs", queries, keys, preferred_element_type=accumulator(queries.dtype)
    )
    token = start[..., None] + jnp.arange(block.size, dtype=jnp.int32)[None, None, None]
    # A lane without a pair stands before all tokens. What follows the query's text is in its future.
    newest = take_rows(jnp.broadcast_to(here.newest[:, None], here.names.shape[:3]), query)
    newest = for_each_head(jnp.where(valid, newest, -1), q_chunk.shape[3])
    mask = token[..., None, :] <= newest[..., None]
    scores = jnp.where(mask, scores * block.scale, -jnp.inf)
    return _Step(start, query, keys, values, queries, scores)


def _take_windows(
    x: Float[Array, "B Hkv S D"], starts: Int[Array, "B Hkv X"], size: int
) -> Float[Array, "B Hkv X size D"]:
    """`size` rows from each start on."""
    return jax.vmap(jax.vmap(jax.vmap(lambda y, at: lax.dynamic_slice_in_dim(y, at, size), (None, 0))))(
        x, starts
    )


def _rows_of(x: Array, query: Int[Array, "B Hkv X P"]) -> Array:
    """x [B, Hkv, T, G, ...] of the queries of each tile: [B, Hkv, X, P * G, ...]."""
    return merge(take_rows(x, query), 3)


class _Data(NamedTuple):
    """Keys and values, so long that every block is within."""

    keys: Float[Array, "B Hkv S Dk"]
    values: Float[Array, "B Hkv S Dv"]


def _data(block: Block, names: _Names, k: Array, v: Array) -> _Data:
    beyond = ceil_div(k.shape[1], names.unit) * names.unit + block.size - names.unit - k.shape[1]
    pad = lambda x: jnp.pad(heads_first(x), ((0, 0), (0, 0), (0, beyond), (0, 0)))
    return _Data(pad(k), pad(v))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_to_blocks(
    block: Block,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B T Hkv n"],
    positions: Positions,
) -> Float[Array, "B T Hkv G Dv"]:
    """Softmax attention over the tokens of the selected blocks that are not in the query's future.

    A query without any such token gets exactly 0. Reverse mode only; indices and positions have no gradient.
    """
    return _forward(block, q, k, v, indices, positions)[0]


def _forward(
    block: Block, q: Array, k: Array, v: Array, indices: Array, positions: Positions
) -> tuple[Array, Float[Array, "B T Hkv G"]]:
    length, selected, dtype = q.shape[1], indices.shape[-1], accumulator(q.dtype)
    names = _names(block, k, positions)
    data = _data(block, names, k, v)
    sizes, blocks = _sizes(q, v, block, names, selected)

    def one_chunk(
        state: tuple[Array, Array, Array], chunk: tuple[Array, _Chunk]
    ) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        q_chunk, here = heads_first(chunk[0]), chunk[1]
        plan = plan_pairs(sizes, here.names, names.end, blocks)

        def one_step(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tiles = _step(block, names.unit, sizes, plan, data, q_chunk, here, step)
            top = jnp.max(tiles.scores, axis=-1)
            weights = jnp.exp(tiles.scores - finite(top)[..., None])
            out = jnp.einsum(
                "bhxrs,bhxsd->bhxrd", weights.astype(v.dtype), tiles.values, preferred_element_type=dtype
            )
            new, start = (top, jnp.sum(weights, axis=-1), out), step * sizes.step
            return (
                _store(state[0], new[0], start),
                _store(state[1], new[1], start),
                _store(state[2], new[2], start),
            )

        state = lax.fori_loop(jnp.zeros_like(plan.steps), plan.steps, one_step, state)
        top, total, part = (_pairs(x, q.shape[3]) for x in state)
        out, lse = _combine(plan, top, total, part, q.dtype)
        return state, (heads_first(out), heads_first(lse))

    chunks = (to_chunks(q, sizes.queries), _chunks(block, names, sizes.queries, indices, positions))
    # Filled once for all chunks: what a chunk does not write it does not read.
    lanes = _lanes(q, sizes)
    numbers = jnp.zeros(lanes, dtype)
    state = (numbers, numbers, jnp.zeros((*lanes, v.shape[-1]), dtype))
    _, (out, lse) = lax.scan(one_chunk, state, chunks)
    return from_chunks(out, length), from_chunks(lse, length)


def _lanes(q: Array, sizes: Sizes) -> tuple[int, ...]:
    """Of all pairs of a chunk."""
    batch, _, kv_heads, groups, _ = q.shape
    return batch, kv_heads, sizes.tiles, sizes.pairs * groups


def _store(state: Array, new: Array, start: Array) -> Array:
    """Write the tiles of one step."""
    return lax.dynamic_update_slice_in_dim(state, new, start, axis=2)


def _pairs(x: Array, groups: int) -> Array:
    """[B, Hkv, X, P * G, ...] -> [B, Hkv, X * P, G, ...]."""
    return split(merge(x, 2), 2, groups)


def _combine(plan: Plan, top: Array, total: Array, part: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Join the partial softmaxes of each query's n blocks; missing slots have none, whatever lies there."""
    there = plan.pair_valid[..., None]
    tops = jnp.where(there, take_rows(top, plan.pair_place), -jnp.inf)
    best = jnp.max(tops, axis=3)
    fade = jnp.exp(tops - finite(best)[:, :, :, None])
    whole = jnp.sum(fade * where_finite(there, take_rows(total, plan.pair_place)), axis=3)
    seen = whole != 0  # of NaN too
    whole = jnp.where(seen, whole, jnp.ones_like(whole))

    def add(slot: Array, out: Array) -> Array:
        place = lax.dynamic_index_in_dim(plan.pair_place, slot, axis=3, keepdims=False)
        weight = lax.dynamic_index_in_dim(fade, slot, axis=3, keepdims=False)[..., None]
        real = lax.dynamic_index_in_dim(there, slot, axis=3, keepdims=False)[..., None]
        return out + where_finite(real, take_rows(part, place) * weight)

    out = jnp.zeros((*whole.shape, part.shape[-1]), part.dtype)
    out = lax.fori_loop(0, plan.pair_place.shape[3], add, out) / whole[..., None]
    return out.astype(dtype), jnp.where(seen, finite(best) + jnp.log(whole), -jnp.inf)


def _forward_saving(
    block: Block, q: Array, k: Array, v: Array, indices: Array, positions: Positions
) -> tuple[Array, Residuals]:
    out, lse = named(*_forward(block, q, k, v, indices, positions))
    return out, Residuals(q, k, v, indices, positions, out, lse)


def _backward(block: Block, saved: Residuals, d_out: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, indices, positions, out, lse = saved
    assert indices is not None
    k = without_nan(k)
    length, selected, dtype = q.shape[1], indices.shape[-1], accumulator(q.dtype)
    names = _names(block, k, positions)
    data = _data(block, names, k, v)
    sizes, blocks = _sizes(q, v, block, names, selected)
    shift = dot_outputs(d_out.astype(dtype), out)

    def one_chunk(
        state: tuple[Array, Array, Array], chunk: tuple[tuple[Array, ...], _Chunk]
    ) -> tuple[tuple[Array, Array, Array], Array]:
        q_chunk, d_chunk, floor, shift_chunk = map(heads_first, chunk[0])
        here = chunk[1]
        plan = plan_pairs(sizes, here.names, names.end, blocks)

        def one_step(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            tiles = _step(block, names.unit, sizes, plan, data, q_chunk, here, step)
            d_tiles = _rows_of(d_chunk, tiles.query)
            weights = jnp.exp(tiles.scores - _rows_of(floor, tiles.query)[..., None])
            d_weights = jnp.einsum("bhxrd,bhxsd->bhxrs", d_tiles, tiles.values, preferred_element_type=dtype)
            d_scores = weights * (d_weights - _rows_of(shift_chunk, tiles.query)[..., None]) * block.scale
            d_scores = d_scores.astype(q.dtype)
            dq_tiles = jnp.einsum("bhxrs,bhxsd->bhxrd", d_scores, tiles.keys, preferred_element_type=dtype)
            dk_tiles = _over_rows(tiles.queries, d_scores, dtype)
            dv_tiles = _over_rows(d_tiles, weights.astype(v.dtype), dtype)
            return (
                _store(dq, dq_tiles, step * sizes.step),
                _add_windows(dk, tiles.start, dk_tiles),
                _add_windows(dv, tiles.start, dv_tiles),
            )

        state = lax.fori_loop(jnp.zeros_like(plan.steps), plan.steps, one_step, state)
        return state, heads_first(_gather_sum(plan, _pairs(state[0], q.shape[3])).astype(q.dtype))

    chunks = tuple(to_chunks(x, sizes.queries) for x in (q, d_out, softmax_floor(lse), shift))
    # Summed as [.., D, S]: a CPU then transposes the queries for the product, not the larger scores.
    sums = (_transposed_zeros(data.keys, dtype), _transposed_zeros(data.values, dtype))
    here = _chunks(block, names, sizes.queries, indices, positions)
    parts = jnp.zeros((*_lanes(q, sizes), q.shape[4]), dtype)
    (_, dk, dv), dq = lax.scan(one_chunk, (parts, *sums), (chunks, here))
    return from_chunks(dq, length), _join(dk, k), _join(dv, v), None, None


def _over_rows(
    x: Float[Array, "B Hkv X rows D"], y: Float[Array, "B Hkv X rows size"], dtype: jnp.dtype
) -> Float[Array, "B Hkv X D size"]:
    """Sum over the rows of a tile of x * y."""
    return jnp.einsum("bhxdr,bhxrs->bhxds", transposed(x), y, preferred_element_type=dtype)


def _gather_sum(plan: Plan, dq: Array) -> Array:
    """Sum the gradients of each query's n pairs."""

    def add(slot: Array, total: Array) -> Array:
        place = lax.dynamic_index_in_dim(plan.pair_place, slot, axis=3, keepdims=False)
        there = lax.dynamic_index_in_dim(plan.pair_valid, slot, axis=3, keepdims=False)
        return total + jnp.where(there[..., None, None], take_rows(dq, place), 0.0)

    total = jnp.zeros((*plan.pair_place.shape[:3], *dq.shape[3:]), dq.dtype)
    return lax.fori_loop(0, plan.pair_place.shape[3], add, total)


def _add_windows(
    sums: Float[Array, "B Hkv D S"], starts: Int[Array, "B Hkv X"], new: Float[Array, "B Hkv X D size"]
) -> Array:
    """sums[b, h, :, start:start + size] += new[b, h, x] for each start; starts are ascending."""
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(1,)
    )

    def add(total: Array, index: Array, part: Array) -> Array:
        return lax.scatter_add(
            total,
            index[:, None],
            part,
            numbers,
            indices_are_sorted=True,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    return jax.vmap(jax.vmap(add))(sums, starts, new)


def _transposed_zeros(x: Float[Array, "B Hkv S D"], dtype: jnp.dtype) -> Array:
    batch, kv_heads, length, dim = x.shape
    return jnp.zeros((batch, kv_heads, dim, length), dtype)


def _join(sums: Float[Array, "B Hkv D S"], like: Array) -> Array:
    """[B, S, Hkv, D] without padding, in the dtype of `like`."""
    return jnp.transpose(sums[..., : like.shape[1]], (0, 3, 1, 2)).astype(like.dtype)


attend_to_blocks.defvjp(_forward_saving, _backward)
