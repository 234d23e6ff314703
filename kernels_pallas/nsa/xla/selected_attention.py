"""Attention of each query over the blocks that were selected for its GQA group.

Pairs (query, block) of one chunk of queries are sorted by block and cut into tiles of pairs that share their
block (query_block_pairs.py). A tile is one small matrix product: the block's keys are read once for all
pairs of the tile instead of once for every pair, and the gradients of keys and values are summed within a
tile before they are added to the block. Memory per chunk is (queries x n) partial results; chunks shrink as
heads and n grow.
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
    finite,
    heads_first,
    pad_axis,
    power_of_two_at_most,
)
from kernels_pallas.nsa.xla.query_block_pairs import Plan, Sizes, plan_pairs
from kernels_pallas.nsa.xla.tiling import (
    chunk_positions,
    for_each_head,
    from_chunks,
    merge,
    query_chunk,
    split,
    take_rows,
    tile_elements,
    to_chunks,
)

# Elements of the partial results of one chunk (all pairs, all heads of the group).
PARTIAL_ELEMENTS = 1 << 23


def _sizes(q: Array, v: Array, block: Block, blocks: int, selected: int) -> Sizes:
    batch, length, kv_heads, groups, dim = q.shape
    rows = batch * kv_heads
    width = max(dim, v.shape[-1])
    queries = query_chunk(length, rows * selected * groups * width, budget=PARTIAL_ELEMENTS)
    queries = min(queries, max(1, np.iinfo(np.int32).max // ((blocks + 1) * selected)))
    per_block = ceil_div(queries * selected, blocks)
    pairs = power_of_two_at_most(min(max(per_block // 2, 128 // groups, 1), max(1, 512 // groups)))
    pairs = min(pairs, power_of_two_at_most(queries))
    tiles = queries * selected // pairs + min(blocks, queries * selected)
    step = min(max(1, tile_elements() // (rows * pairs * groups * block.size)), tiles)
    return Sizes(queries, pairs, step, ceil_div(tiles, step) * step)


class _Step(NamedTuple):
    """What one step of the loop works on: X tiles, each of one block and P pairs.

    A pair has a row for each of the group's G heads.
    """

    block: Int[Array, "B Hkv X"]
    query: Int[Array, "B Hkv X P"]
    keys: Float[Array, "B Hkv X size Dk"]
    values: Float[Array, "B Hkv X size Dv"]
    queries: Float[Array, "B Hkv X rows Dk"]
    scores: Float[Array, "B Hkv X rows size"]


def _step(
    block: Block, sizes: Sizes, plan: Plan, data: "_Data", q_chunk: Array, here: Positions, step: Array
) -> _Step:
    """Gather the tiles of one step and compute their masked scores."""

    def cut(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, step * sizes.step, sizes.step, axis=2)

    tile_block, query, valid = cut(plan.tile_block), cut(plan.tile_query), cut(plan.tile_valid)
    keys, values = take_rows(data.keys, tile_block), take_rows(data.values, tile_block)
    queries = _rows_of(q_chunk, query)
    scores = jnp.einsum(
        "bhxrd,bhxsd->bhxrs", queries, keys, preferred_element_type=accumulator(queries.dtype)
    )
    token = tile_block[..., None] * block.size + jnp.arange(block.size, dtype=jnp.int32)[None, None, None]
    groups = q_chunk.shape[3]
    # A lane without a pair stands before all tokens.
    position = jnp.where(valid, _of_query(here.q_positions, query), -1)
    position = for_each_head(position, groups)
    mask = (token[..., None, :] <= position[..., None]) & (token < data.num_keys)[..., None, :]
    if here.q_segments is not None and data.segments is not None:
        token_segment = take_rows(_per_head(data.segments, query), tile_block)
        segment = for_each_head(_of_query(here.q_segments, query), groups)
        mask &= token_segment[..., None, :] == segment[..., None]
        mask &= (token_segment != 0)[..., None, :]
    scores = jnp.where(mask, scores * block.scale, -jnp.inf)
    return _Step(tile_block, query, keys, values, queries, scores)


def _rows_of(x: Array, query: Int[Array, "B Hkv X P"]) -> Array:
    """x [B, Hkv, T, G, ...] of the queries of each tile: [B, Hkv, X, P * G, ...]."""
    return merge(take_rows(x, query), 3)


def _per_head(x: Array, like: Array) -> Array:
    """[B, ...] -> [B, Hkv, ...]."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], like.shape[1], *x.shape[1:]))


def _of_query(x: Int[Array, "B T"], query: Int[Array, "B Hkv X P"]) -> Int[Array, "B Hkv X P"]:
    return take_rows(_per_head(x, query), query)


class _Data(NamedTuple):
    """Keys and values cut into blocks."""

    keys: Float[Array, "B Hkv N size Dk"]
    values: Float[Array, "B Hkv N size Dv"]
    segments: Int[Array, "B N size"] | None
    num_keys: int


def _blocks(block: Block, k: Array, v: Array, positions: Positions) -> _Data:
    def cut(x: Array) -> Array:
        x = pad_axis(x, 1, block.size)
        return x.reshape(x.shape[0], x.shape[1] // block.size, block.size, *x.shape[2:])

    segments = None if positions.key_segments is None else cut(positions.key_segments)
    return _Data(jnp.moveaxis(cut(k), 3, 1), jnp.moveaxis(cut(v), 3, 1), segments, k.shape[1])


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
    data = _blocks(block, k, v, positions)
    blocks = data.keys.shape[2]
    sizes = _sizes(q, v, block, blocks, selected)

    def one_chunk(chunk: tuple[Array, Array, Positions]) -> tuple[Array, Array]:
        q_chunk, here = heads_first(chunk[0]), chunk[2]
        plan = plan_pairs(sizes, heads_first(chunk[1]), blocks)

        def one_step(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tiles = _step(block, sizes, plan, data, q_chunk, here, step)
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

        groups = q_chunk.shape[3]
        lanes = (*q_chunk.shape[:2], sizes.tiles, sizes.pairs * groups)
        state = (
            jnp.full(lanes, -jnp.inf, dtype),
            jnp.zeros(lanes, dtype),
            jnp.zeros((*lanes, v.shape[-1]), dtype),
        )
        state = lax.fori_loop(jnp.zeros_like(plan.steps), plan.steps, one_step, state)
        top, total, part = (_pairs(x, groups) for x in state)
        out, lse = _combine(plan, top, total, part, q.dtype)
        return heads_first(out), heads_first(lse)

    selected_chunks = to_chunks(indices, sizes.queries, fill=-1)
    chunks = (to_chunks(q, sizes.queries), selected_chunks, chunk_positions(positions, sizes.queries))
    out, lse = lax.map(one_chunk, chunks)
    return from_chunks(out, length), from_chunks(lse, length)


def _store(state: Array, new: Array, start: Array) -> Array:
    """Write the tiles of one step."""
    return lax.dynamic_update_slice_in_dim(state, new, start, axis=2)


def _pairs(x: Array, groups: int) -> Array:
    """[B, Hkv, X, P * G, ...] -> [B, Hkv, X * P, G, ...]."""
    return split(merge(x, 2), 2, groups)


def _combine(plan: Plan, top: Array, total: Array, part: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Join the partial softmaxes of each query's n blocks."""
    tops = jnp.where(plan.pair_valid[..., None], take_rows(top, plan.pair_place), -jnp.inf)
    best = jnp.max(tops, axis=3)
    fade = jnp.exp(tops - finite(best)[:, :, :, None])
    whole = jnp.sum(fade * take_rows(total, plan.pair_place), axis=3)
    seen = whole > 0
    whole = jnp.where(seen, whole, jnp.ones_like(whole))

    def add(slot: Array, out: Array) -> Array:
        place = lax.dynamic_index_in_dim(plan.pair_place, slot, axis=3, keepdims=False)
        weight = lax.dynamic_index_in_dim(fade, slot, axis=3, keepdims=False)
        return out + take_rows(part, place) * weight[..., None]

    out = jnp.zeros((*whole.shape, part.shape[-1]), part.dtype)
    out = lax.fori_loop(0, plan.pair_place.shape[3], add, out) / whole[..., None]
    return out.astype(dtype), jnp.where(seen, finite(best) + jnp.log(whole), -jnp.inf)


def _forward_saving(
    block: Block, q: Array, k: Array, v: Array, indices: Array, positions: Positions
) -> tuple[Array, Residuals]:
    out, lse = _forward(block, q, k, v, indices, positions)
    return out, Residuals(q, k, v, indices, positions, out, lse)


def _backward(block: Block, saved: Residuals, d_out: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, indices, positions, out, lse = saved
    assert indices is not None
    length, selected, dtype = q.shape[1], indices.shape[-1], accumulator(q.dtype)
    data = _blocks(block, k, v, positions)
    blocks = data.keys.shape[2]
    sizes = _sizes(q, v, block, blocks, selected)
    shift = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)

    def one_chunk(
        sums: tuple[Array, Array], chunk: tuple[tuple[Array, ...], Array, Positions]
    ) -> tuple[tuple[Array, Array], Array]:
        q_chunk, d_chunk, floor, shift_chunk = map(heads_first, chunk[0])
        selected_chunk, here = heads_first(chunk[1]), chunk[2]
        plan = plan_pairs(sizes, selected_chunk, blocks)

        def one_step(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            tiles = _step(block, sizes, plan, data, q_chunk, here, step)
            d_tiles = _rows_of(d_chunk, tiles.query)
            weights = jnp.exp(tiles.scores - _rows_of(floor, tiles.query)[..., None])
            d_weights = jnp.einsum("bhxrd,bhxsd->bhxrs", d_tiles, tiles.values, preferred_element_type=dtype)
            d_scores = weights * (d_weights - _rows_of(shift_chunk, tiles.query)[..., None]) * block.scale
            d_scores = d_scores.astype(q.dtype)
            dq_tiles = jnp.einsum("bhxrs,bhxsd->bhxrd", d_scores, tiles.keys, preferred_element_type=dtype)
            dk_tiles = jnp.einsum("bhxrd,bhxrs->bhxds", tiles.queries, d_scores, preferred_element_type=dtype)
            dv_tiles = jnp.einsum(
                "bhxrd,bhxrs->bhxds", d_tiles, weights.astype(v.dtype), preferred_element_type=dtype
            )
            return (
                _store(dq, dq_tiles, step * sizes.step),
                _add_rows(dk, tiles.block, dk_tiles),
                _add_rows(dv, tiles.block, dv_tiles),
            )

        groups, dim = q_chunk.shape[3:]
        lanes = (*q_chunk.shape[:2], sizes.tiles, sizes.pairs * groups, dim)
        state = (jnp.zeros(lanes, dtype), *sums)
        dq, dk, dv = lax.fori_loop(jnp.zeros_like(plan.steps), plan.steps, one_step, state)
        return (dk, dv), heads_first(_gather_sum(plan, _pairs(dq, groups)).astype(q.dtype))

    chunks = tuple(to_chunks(x, sizes.queries) for x in (q, d_out, finite(lse), shift))
    selected_chunks = to_chunks(indices, sizes.queries, fill=-1)
    # Summed as [.., D, size]: a CPU then transposes the queries for the product, not the larger scores.
    sums = (_transposed_zeros(data.keys, dtype), _transposed_zeros(data.values, dtype))
    (dk, dv), dq = lax.scan(
        one_chunk, sums, (chunks, selected_chunks, chunk_positions(positions, sizes.queries))
    )
    return from_chunks(dq, length), _join(dk, k), _join(dv, v), None, None


def _gather_sum(plan: Plan, dq: Array) -> Array:
    """Sum the gradients of each query's n pairs."""

    def add(slot: Array, total: Array) -> Array:
        place = lax.dynamic_index_in_dim(plan.pair_place, slot, axis=3, keepdims=False)
        there = lax.dynamic_index_in_dim(plan.pair_valid, slot, axis=3, keepdims=False)
        return total + jnp.where(there[..., None, None], take_rows(dq, place), 0.0)

    total = jnp.zeros((*plan.pair_place.shape[:3], *dq.shape[3:]), dq.dtype)
    return lax.fori_loop(0, plan.pair_place.shape[3], add, total)


def _add_rows(sums: Array, rows: Int[Array, "B Hkv X"], new: Array) -> Array:
    """sums[b, h, rows[b, h, x]] += new[b, h, x]; rows are ascending."""

    def add(total: Array, index: Array, part: Array) -> Array:
        return total.at[index].add(part, indices_are_sorted=True, mode="promise_in_bounds")

    return jax.vmap(jax.vmap(add))(sums, rows, new)


def _transposed_zeros(blocks: Array, dtype: jnp.dtype) -> Array:
    *rows, size, dim = blocks.shape
    return jnp.zeros((*rows, dim, size), dtype)


def _join(blocks: Float[Array, "B Hkv N D size"], like: Array) -> Array:
    """Blocks -> [B, S, Hkv, D], in the dtype of `like`."""
    batch, kv_heads, number, dim, size = blocks.shape
    tokens = jnp.transpose(blocks, (0, 2, 4, 1, 3)).reshape(batch, number * size, kv_heads, dim)
    return tokens[:, : like.shape[1]].astype(like.dtype)


attend_to_blocks.defvjp(_forward_saving, _backward)
