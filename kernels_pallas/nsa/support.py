"""Checks of arguments, where queries stand, grouping of heads, and what padding may not reach."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.nsa.base import Positions, num_compressed, where_finite


def check_attention(q: Array, k: Array, v: Array, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, not {size}")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v must have 4 axes, not {q.ndim}, {k.ndim}, {v.ndim}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads equally")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k, v must be floating point, not {q.dtype}")


def check_indices(q: Array, k: Array, indices: Array | None) -> None:
    """Those of selected blocks, for q [B, T, H, Dk] and k [B, S, Hkv, Dk]."""
    expected = (q.shape[0], k.shape[2], q.shape[1])
    if indices is not None and (indices.ndim != 4 or indices.shape[:3] != expected or indices.shape[3] == 0):
        raise ValueError(f"indices have shape {indices.shape}, not {expected} and at least one slot")


def check_selection(block_size: int, num_blocks: int, num_init: int, num_local: int) -> None:
    if min(block_size, num_blocks) < 1 or min(num_init, num_local) < 0:
        raise ValueError(
            f"block_size {block_size} and num_blocks {num_blocks} must be positive, "
            f"num_init {num_init} and num_local {num_local} not negative"
        )
    if num_init + num_local > num_blocks:
        raise ValueError(
            f"{num_init} first and {num_local} local blocks do not fit into num_blocks={num_blocks}"
        )


def check_num_compressed(
    blocks: int,
    segment_ids: Array | None,
    q: Array,
    q_positions: Array | None,
    block_len: int,
    stride: int,
) -> None:
    """The number of compressed blocks, where the number of tokens is known."""
    if segment_ids is None and q_positions is not None:
        return
    length = q.shape[1] if segment_ids is None else segment_ids.shape[1]
    expected = num_compressed(length, block_len, stride)
    if blocks != expected:
        raise ValueError(
            f"{length} tokens have {expected} complete blocks of {block_len} every {stride}, not {blocks}"
        )


def positions_of(
    q: Array, segment_ids: Array | None, q_positions: Array | None, num_keys: int | None
) -> Positions:
    batch, length = q.shape[:2]
    if segment_ids is not None:
        if num_keys is not None and segment_ids.shape != (batch, num_keys):
            raise ValueError(f"segment_ids have shape {segment_ids.shape}, not {(batch, num_keys)}")
        num_keys = segment_ids.shape[1]
    if q_positions is None:
        if num_keys is not None and num_keys != length:
            raise ValueError(f"{length} queries against {num_keys} keys need q_positions")
        q_positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        return Positions(q_positions, segment_ids, segment_ids)
    if q_positions.shape != (batch, length):
        raise ValueError(f"q_positions have shape {q_positions.shape}, not {(batch, length)}")
    q_positions = q_positions.astype(jnp.int32)
    if segment_ids is None:
        return Positions(q_positions)
    return Positions(q_positions, jnp.take_along_axis(segment_ids, q_positions, axis=1), segment_ids)


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
