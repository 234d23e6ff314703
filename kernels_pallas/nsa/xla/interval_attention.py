"""Attention over keys at regularly spaced positions, in tiles, skipping the tiles that no query of a chunk
sees.

One piece of code serves two branches of Native Sparse Attention: compressed keys (those of the blocks of the
query's text that are complete) and the sliding window (the last w tokens). Either way a query sees keys that
lie beside each other. Forward and backward keep one tile of scores at a time, so memory is linear in the
number of queries and of keys.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import (
    Interval,
    Positions,
    Residuals,
    accumulator,
    ceil_div,
    finite,
    heads_first,
    intervals,
    named,
    softmax_floor,
    softmax_shift,
    without_nan,
)
from kernels_pallas.nsa.xla.tiling import (
    for_each_head,
    from_chunks,
    merge,
    query_chunk,
    split,
    tile_elements,
    to_chunks,
    transposed,
)

KEY_TILE = 256
"""Keys of a tile of a window, or a few more, at most half as many again; of compressed ones half as many."""


class Tiles(NamedTuple):
    """Static sizes: queries per chunk, keys per tile, keys in all (padding not counted)."""

    queries: int
    keys: int
    num_keys: int


def _tiles(interval: Interval, q: Array, num_keys: int) -> Tiles:
    """Half of what a tile may have, so that fewer keys are read that no query of the chunk sees; keys of a
    window are divided evenly."""
    batch, length, kv_heads, groups, _ = q.shape
    keys = min(KEY_TILE, ceil_div(num_keys, 8) * 8)
    queries = query_chunk(length, batch * kv_heads * groups * keys, budget=tile_elements() // 2)
    if interval.window is None:
        keys = min(max(8, KEY_TILE // 2), keys)
    else:
        span = min(interval.window + queries - 1, num_keys)
        keys = ceil_div(ceil_div(span, max(1, span // KEY_TILE)), 8) * 8
    return Tiles(queries, keys, num_keys)


class Seen(NamedTuple):
    """The keys first <= i < end that each query sees."""

    first: Int[Array, "B T"]
    end: Int[Array, "B T"]


def _chunks(interval: Interval, tiles: Tiles, positions: Positions) -> Seen:
    """What queries see, [chunks, B, queries]; those that fill the last chunk up see nothing."""
    first, end = intervals(positions, interval.stride, interval.offset, interval.window)
    end = jnp.minimum(end, tiles.num_keys)
    return Seen(to_chunks(first, tiles.queries), to_chunks(end, tiles.queries))


def _tile_range(tiles: Tiles, seen: Seen) -> tuple[Array, Array]:
    """The first key that some query of the chunk sees, and the number of tiles from there to the last one."""
    some = seen.first < seen.end
    end = jnp.max(jnp.where(some, seen.end, 0))
    start = jnp.min(jnp.where(some, seen.first, end))
    return start, -((start - end) // tiles.keys)


def _visible(tiles: Tiles, rows: Seen, start: Array) -> Array:
    """Mask [B, 1, rows, keys] of one chunk's rows against one tile of keys, which begins at `start`."""
    index = start + jnp.arange(tiles.keys, dtype=jnp.int32)[None, None, :]
    return ((index >= rows.first[..., None]) & (index < rows.end[..., None]))[:, None]


def _rows(x: Array) -> Array:
    """[B, T, Hkv, G, ...] -> [B, Hkv, T * G, ...]."""
    return merge(heads_first(x), 2)


def _queries(x: Array, groups: int) -> Array:
    """[B, Hkv, T * G, ...] -> [B, T, Hkv, G, ...]."""
    return heads_first(split(x, 2, groups))


def _tile(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis=2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_to_intervals(
    interval: Interval,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    positions: Positions,
) -> tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]]:
    """Softmax attention of each query over the keys that its interval shows it.

    Returns the output in the dtype of q and the log-sum-exp in float32; a query that sees nothing gets
    exactly 0 and -inf. Reverse mode only; the positions and segments have no gradient.
    """
    return _forward(interval, q, k, v, positions)


def _forward(interval: Interval, q: Array, k: Array, v: Array, positions: Positions) -> tuple[Array, Array]:
    length, groups, dtype = q.shape[1], q.shape[3], accumulator(q.dtype)
    tiles = _tiles(interval, q, k.shape[1])
    keys, values = _padded(tiles, k), _padded(tiles, v)

    def one_chunk(chunk: tuple[Array, Seen]) -> tuple[Array, Array]:
        q_chunk, here = _rows(chunk[0]), chunk[1]
        rows = Seen(*(for_each_head(x, groups) for x in here))

        def one_tile(tile: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state
            at = start + tile * tiles.keys
            k_tile, v_tile = _tile(keys, at, tiles.keys), _tile(values, at, tiles.keys)
            scores = jnp.einsum("bhrd,bhsd->bhrs", q_chunk, k_tile, preferred_element_type=dtype)
            mask = _visible(tiles, rows, at)
            scores = jnp.where(mask, scores * interval.scale, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - finite(new_top)[..., None])
            fade = jnp.exp(top - finite(new_top))
            added = jnp.einsum(
                "bhrs,bhsd->bhrd", weights.astype(v.dtype), v_tile, preferred_element_type=dtype
            )
            return new_top, total * fade + jnp.sum(weights, axis=-1), out * fade[..., None] + added

        shape = q_chunk.shape[:-1]
        state = (
            jnp.full(shape, -jnp.inf, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((*shape, v.shape[-1]), dtype),
        )
        start, count = _tile_range(tiles, here)
        top, total, out = lax.fori_loop(jnp.zeros_like(count), count, one_tile, state)
        seen = total != 0  # of NaN too
        total = jnp.where(seen, total, jnp.ones_like(total))
        lse = jnp.where(seen, finite(top) + jnp.log(total), -jnp.inf)
        out = (out / total[..., None]).astype(q.dtype)
        return _queries(out, groups), _queries(lse, groups)

    out, lse = lax.map(one_chunk, (to_chunks(q, tiles.queries), _chunks(interval, tiles, positions)))
    return from_chunks(out, length), from_chunks(lse, length)


def _padded(tiles: Tiles, x: Array) -> Float[Array, "B Hkv S D"]:
    """So many that a tile that begins at the last key is within."""
    return jnp.pad(heads_first(x), ((0, 0), (0, 0), (0, tiles.keys), (0, 0)))


def _forward_saving(
    interval: Interval, q: Array, k: Array, v: Array, positions: Positions
) -> tuple[tuple[Array, Array], Residuals]:
    out, lse = named(*_forward(interval, q, k, v, positions))
    return (out, lse), Residuals(q, k, v, None, positions, out, lse)


def _backward(
    interval: Interval, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    q, k, v, _, positions, _, lse = saved
    k = without_nan(k)
    d_out, d_lse = cotangents
    length, groups, dtype = q.shape[1], q.shape[3], accumulator(q.dtype)
    tiles = _tiles(interval, q, k.shape[1])
    keys, values = _padded(tiles, k), _padded(tiles, v)
    # d softmax: the mean of d_out . v under the softmax is d_out . out; a cotangent of the log-sum-exp adds
    # to it.
    shift = softmax_shift(saved, d_out, d_lse)

    def one_chunk(
        sums: tuple[Array, Array], chunk: tuple[tuple[Array, ...], Seen]
    ) -> tuple[tuple[Array, Array], Array]:
        q_chunk, d_chunk, lse_chunk, shift_chunk = map(_rows, chunk[0])
        here, rows = chunk[1], Seen(*(for_each_head(x, groups) for x in chunk[1]))
        floor = softmax_floor(lse_chunk)[..., None]
        q_turned, d_turned = transposed(q_chunk), transposed(d_chunk)

        def one_tile(tile: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            at = start + tile * tiles.keys
            k_tile, v_tile = _tile(keys, at, tiles.keys), _tile(values, at, tiles.keys)
            scores = jnp.einsum("bhrd,bhsd->bhrs", q_chunk, k_tile, preferred_element_type=dtype)
            mask = _visible(tiles, rows, at)
            weights = jnp.exp(jnp.where(mask, scores * interval.scale, -jnp.inf) - floor)
            d_weights = jnp.einsum("bhrd,bhsd->bhrs", d_chunk, v_tile, preferred_element_type=dtype)
            d_scores = (weights * (d_weights - shift_chunk[..., None]) * interval.scale).astype(q.dtype)
            dq += jnp.einsum("bhrs,bhsd->bhrd", d_scores, k_tile, preferred_element_type=dtype)
            dk_tile = jnp.einsum("bhdr,bhrs->bhds", q_turned, d_scores, preferred_element_type=dtype)
            dv_tile = jnp.einsum(
                "bhdr,bhrs->bhds", d_turned, weights.astype(v.dtype), preferred_element_type=dtype
            )
            return dq, _add_tile(dk, dk_tile, at), _add_tile(dv, dv_tile, at)

        start, count = _tile_range(tiles, here)
        none = jnp.zeros_like(count)
        dq, dk, dv = lax.fori_loop(none, count, one_tile, (jnp.zeros(q_chunk.shape, dtype), *sums))
        return (dk, dv), _queries(dq.astype(q.dtype), groups)

    # Summed as [.., D, S]: a CPU then transposes the queries for the product, not the far larger scores.
    sums = (_transposed_zeros(keys, dtype), _transposed_zeros(values, dtype))
    chunks = tuple(to_chunks(x, tiles.queries) for x in (q, d_out, lse, shift))
    (dk, dv), dq = lax.scan(one_chunk, sums, (chunks, _chunks(interval, tiles, positions)))
    return from_chunks(dq, length), _tokens_first(dk, k), _tokens_first(dv, v), None


def _transposed_zeros(x: Array, dtype: jnp.dtype) -> Array:
    batch, kv_heads, length, dim = x.shape
    return jnp.zeros((batch, kv_heads, dim, length), dtype)


def _add_tile(sums: Array, tile_sum: Array, start: Array) -> Array:
    old = lax.dynamic_slice_in_dim(sums, start, tile_sum.shape[3], axis=3)
    return lax.dynamic_update_slice_in_dim(sums, old + tile_sum, start, axis=3)


def _tokens_first(sums: Float[Array, "B Hkv D S"], like: Array) -> Array:
    """[B, S, Hkv, D] without padding, in the dtype of `like`."""
    return jnp.transpose(sums[..., : like.shape[1]], (0, 3, 1, 2)).astype(like.dtype)


attend_to_intervals.defvjp(_forward_saving, _backward)
