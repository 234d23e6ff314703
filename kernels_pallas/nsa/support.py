"""Where queries stand, grouping of heads, and what padding and the future may not reach."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.nsa.base import Positions, block_starts, where_finite
from kernels_pallas.nsa.checks import check_queries


def positions_of(
    q: Array, segment_ids: Array | None, q_positions: Array | None, k: Array | None
) -> Positions:
    """Where the queries stand among the keys; k: None where its entries are no tokens."""
    check_queries(q, q_positions, segment_ids, k)
    batch, length = q.shape[:2]
    if q_positions is None:
        q_positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        return Positions(q_positions, segment_ids, segment_ids)
    q_positions = q_positions.astype(jnp.int32)
    if segment_ids is None:
        return Positions(q_positions)
    return Positions(q_positions, jnp.take_along_axis(segment_ids, q_positions, axis=1), segment_ids)


def seen_or_nothing(k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values of which a query that does not see them gets nothing, be they NaN or infinite.

    A weight of 0 does not stop a NaN in a product of weights and values. So such values become 0 and their
    keys NaN: scores are masked one by one, and who sees the key gets NaN.
    """
    good = jnp.all(jnp.isfinite(v), axis=-1, keepdims=True)
    return jnp.where(good, k, jnp.asarray(jnp.nan, k.dtype)), where_finite(good, v)


def without_empty_slots(
    segment_ids: Array, x: Float[Array, "B M Hkv D"], block_len: int, stride: int
) -> Float[Array, "B M Hkv D"]:
    """Zeros in the slots of compressed blocks that hold none, and no gradient to or from there."""
    starts = block_starts(segment_ids, block_len=block_len, stride=stride)
    return where_finite((starts >= 0)[:, :, None, None], x)


def zero_padding(segments: Array, x: Array) -> Array:
    """Zeros where the segment is 0, and no gradient to or from there."""
    return where_finite((segments != 0)[:, :, None, None], x)


def queries_without_padding(q: Array, positions: Positions) -> Array:
    return q if positions.q_segments is None else zero_padding(positions.q_segments, q)


def without_padding(q: Array, k: Array, v: Array, positions: Positions) -> tuple[Array, Array, Array]:
    if positions.key_segments is None:
        return q, k, v
    segments = positions.key_segments
    return queries_without_padding(q, positions), zero_padding(segments, k), zero_padding(segments, v)


def grouped(q: Array, k: Array) -> Float[Array, "B T Hkv G Dk"]:
    batch, length, heads, dim = q.shape
    return q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)


def heads_joined(out: Float[Array, "B T Hkv G Dv"], positions: Positions) -> Float[Array, "B T H Dv"]:
    """Join the heads; the mask keeps a cotangent that arrives at padding (NaN, say) from going further."""
    batch, length, kv_heads, groups, dim = out.shape
    return queries_without_padding(out.reshape(batch, length, kv_heads * groups, dim), positions)
