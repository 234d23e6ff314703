"""Selection branch: attention of each query over the blocks chosen for its GQA group.

Pairs (query, chosen block) of one chunk of queries are sorted by block and cut into tiles of pairs that share
their block. A tile is one small matrix product: the block's keys are read once for all pairs of the tile
instead of once for every pair, and the gradients of keys and values are summed within a tile before they are
added to the block. Memory per chunk is (queries x n) partial results; chunks shrink as heads and n grow.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.nsa.tiling import (
    Places,
    Residuals,
    accumulator,
    ceil_div,
    chunk_places,
    finite,
    for_each_head,
    from_chunks,
    heads_first,
    merge,
    pad_axis,
    power_of_two_at_most,
    query_chunk,
    split,
    take_rows,
    tile_elements,
    to_chunks,
)

# Elements of the partial results of one chunk (all pairs, all heads of the group).
PARTIAL_ELEMENTS = 1 << 23


class Block(NamedTuple):
    """Static facts of the op."""

    size: int
    scale: float


class Sizes(NamedTuple):
    """Queries per chunk, pairs per tile, tiles per step of the loop, tiles at most per chunk."""

    queries: int
    pairs: int
    step: int
    tiles: int


class Plan(NamedTuple):
    """Where the pairs of one chunk went: X tiles of P pairs each."""

    steps: Int[Array, ""]
    tile_block: Int[Array, "B Hkv X"]
    tile_query: Int[Array, "B Hkv X P"]
    tile_valid: Bool[Array, "B Hkv X P"]
    pair_place: Int[Array, "B Hkv T n"]
    pair_valid: Bool[Array, "B Hkv T n"]


def _sizes(q: Array, v: Array, block: Block, blocks: int, chosen: int) -> Sizes:
    batch, length, kv_heads, groups, dim = q.shape
    rows = batch * kv_heads
    width = max(dim, v.shape[-1])
    queries = query_chunk(length, rows * chosen * groups * width, budget=PARTIAL_ELEMENTS)
    queries = min(queries, max(1, np.iinfo(np.int32).max // ((blocks + 1) * chosen)))
    per_block = ceil_div(queries * chosen, blocks)
    pairs = power_of_two_at_most(min(max(per_block // 2, 128 // groups, 1), max(1, 512 // groups)))
    pairs = min(pairs, power_of_two_at_most(queries))
    tiles = queries * chosen // pairs + min(blocks, queries * chosen)
    step = min(max(1, tile_elements() // (rows * pairs * groups * block.size)), tiles)
    return Sizes(queries, pairs, step, ceil_div(tiles, step) * step)


def plan_pairs(sizes: Sizes, indices: Int[Array, "B Hkv T n"], blocks: int) -> Plan:
    """Sort the pairs by block, then by query, and lay each block's pairs into tiles of their own."""
    *rows, queries, chosen = indices.shape
    pairs = queries * chosen
    valid = (indices >= 0) & (indices < blocks)
    block = jnp.where(valid, indices, blocks).reshape(*rows, pairs)
    number = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32)[None, None], block.shape)
    if (blocks + 1) * pairs <= np.iinfo(np.int32).max:  # one integer for block and pair is sorted sooner
        packed = lax.sort(block * pairs + number, dimension=2, is_stable=False)
        sorted_block, order = packed // pairs, packed % pairs
    else:
        sorted_block, order = lax.sort((block, number), dimension=2, num_keys=1)
    start = first_at_least(sorted_block, jnp.arange(blocks + 1, dtype=jnp.int32))
    start, count = start[..., :-1], start[..., 1:] - start[..., :-1]
    block_tiles = _ceil_div(count, sizes.pairs)
    tiles_end = jnp.cumsum(block_tiles, axis=2, dtype=jnp.int32)
    tiles_start = tiles_end - block_tiles

    tile = jnp.arange(sizes.tiles, dtype=jnp.int32)
    tile_block = first_at_least(tiles_end, tile + 1)
    used = tile_block < blocks
    tile_block = jnp.minimum(tile_block, blocks - 1)
    before = (tile[None, None] - take_rows(tiles_start, tile_block)) * sizes.pairs
    lane = before[..., None] + jnp.arange(sizes.pairs, dtype=jnp.int32)[None, None, None]
    tile_valid = (lane < take_rows(count, tile_block)[..., None]) & used[..., None]
    source = jnp.where(tile_valid, lane + take_rows(start, tile_block)[..., None], 0)

    # Place p of the sorted list is moved on by the lanes that pad the tiles of the blocks before.
    place = _inverse(order) + take_rows(tiles_start * sizes.pairs - start, jnp.minimum(block, blocks - 1))
    place = jnp.where(valid, place.reshape(indices.shape), 0)
    steps = _ceil_div(jnp.max(tiles_end[..., -1]), sizes.step)
    return Plan(steps, tile_block, take_rows(order, source) // chosen, tile_valid, place, valid)


def _inverse(order: Int[Array, "B Hkv E"]) -> Int[Array, "B Hkv E"]:
    """Inverse of a permutation: no index occurs twice, so the scatter is deterministic."""

    def invert(row: Array) -> Array:
        number = jnp.arange(row.shape[0], dtype=jnp.int32)
        return jnp.zeros_like(row).at[row].set(number, unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(jax.vmap(invert))(order)


def first_at_least(ascending: Int[Array, "B Hkv R"], values: Int[Array, " V"]) -> Int[Array, "B Hkv V"]:
    """Index of the first entry that is at least each value."""

    def search(row: Array) -> Array:
        return jnp.searchsorted(row, values).astype(jnp.int32)

    return jax.vmap(jax.vmap(search))(ascending)


def _ceil_div(a: Array, b: int) -> Array:
    return -(-a // b)


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
    block: Block, sizes: Sizes, plan: Plan, data: "_Data", q_chunk: Array, here: Places, step: Array
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


def _blocks(block: Block, k: Array, v: Array, places: Places) -> _Data:
    def cut(x: Array) -> Array:
        x = pad_axis(x, 1, block.size)
        return x.reshape(x.shape[0], x.shape[1] // block.size, block.size, *x.shape[2:])

    segments = None if places.key_segments is None else cut(places.key_segments)
    return _Data(jnp.moveaxis(cut(k), 3, 1), jnp.moveaxis(cut(v), 3, 1), segments, k.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_to_blocks(
    block: Block,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B T Hkv n"],
    places: Places,
) -> Float[Array, "B T Hkv G Dv"]:
    """Softmax attention over the tokens of the chosen blocks that are not in the query's future.

    A query without any such token gets exactly 0. Reverse mode only; indices and places have no gradient.
    """
    return _forward(block, q, k, v, indices, places)[0]


def _forward(
    block: Block, q: Array, k: Array, v: Array, indices: Array, places: Places
) -> tuple[Array, Float[Array, "B T Hkv G"]]:
    length, chosen, dtype = q.shape[1], indices.shape[-1], accumulator(q.dtype)
    data = _blocks(block, k, v, places)
    blocks = data.keys.shape[2]
    sizes = _sizes(q, v, block, blocks, chosen)

    def one_chunk(chunk: tuple[Array, Array, Places]) -> tuple[Array, Array]:
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

    chosen_chunks = to_chunks(indices, sizes.queries, fill=-1)
    chunks = (to_chunks(q, sizes.queries), chosen_chunks, chunk_places(places, sizes.queries))
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
    block: Block, q: Array, k: Array, v: Array, indices: Array, places: Places
) -> tuple[Array, Residuals]:
    out, lse = _forward(block, q, k, v, indices, places)
    return out, Residuals(q, k, v, indices, places, out, lse)


def _backward(block: Block, saved: Residuals, d_out: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, indices, places, out, lse = saved
    assert indices is not None
    length, chosen, dtype = q.shape[1], indices.shape[-1], accumulator(q.dtype)
    data = _blocks(block, k, v, places)
    blocks = data.keys.shape[2]
    sizes = _sizes(q, v, block, blocks, chosen)
    shift = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)

    def one_chunk(
        sums: tuple[Array, Array], chunk: tuple[tuple[Array, ...], Array, Places]
    ) -> tuple[tuple[Array, Array], Array]:
        q_chunk, d_chunk, floor, shift_chunk = map(heads_first, chunk[0])
        chosen_chunk, here = heads_first(chunk[1]), chunk[2]
        plan = plan_pairs(sizes, chosen_chunk, blocks)

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
    chosen_chunks = to_chunks(indices, sizes.queries, fill=-1)
    # Summed as [.., D, size]: a CPU then transposes the queries for the product, not the larger scores.
    sums = (_transposed_zeros(data.keys, dtype), _transposed_zeros(data.values, dtype))
    (dk, dv), dq = lax.scan(one_chunk, sums, (chunks, chosen_chunks, chunk_places(places, sizes.queries)))
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
