"""One token of every sequence over a cache: reads compressed keys, selected blocks and the window only."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import (
    NOWHERE,
    NsaBranches,
    SelectionGrid,
    accumulator,
    finite,
    heads_first,
    weigh,
    where_finite,
)
from kernels_pallas.nsa.decode_cache import Cache, Recent, address, compressed_keys
from kernels_pallas.nsa.importance import block_importance, select_by_rounds


def decode_token(
    grid: SelectionGrid,
    cache: Cache,
    recent: Recent,
    q: Float[Array, "B 1 H Dk"],
    gates: Float[Array, "B 1 H 3"],
    window: int,
    indices: Int[Array, "B Hkv 1 n"] | None,
) -> tuple[Float[Array, "B 1 H Dv"], NsaBranches]:
    """See `Operators.decode_token`."""
    k_cmp, v_cmp = compressed_keys(cache, grid)
    batch, _, heads, dim = q.shape
    kv_heads = recent.k.shape[2]
    rows = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    # A sequence that added no token has no query: it sees nothing.
    position = jnp.where(recent.num_new > 0, cache.length - 1, -1)

    ends = jnp.arange(k_cmp.shape[1], dtype=jnp.int32) * grid.stride + grid.block_len - 1
    visible = (ends[None] <= position[:, None])[:, None]
    compressed_part = _softmax(rows, heads_first(k_cmp), heads_first(v_cmp), visible, grid.scale)
    if indices is None:
        importance = block_importance(grid, jnp.sum(compressed_part.weights, axis=2)[:, :, None])
        newest = (position // grid.block_size)[:, None]
        indices = select_by_rounds(importance, newest, grid.num_blocks, grid.num_init, grid.num_local)

    selected = indices[:, :, 0]
    k, v = (_blocks(grid, cache, x, selected) for x in (cache.k_slc, cache.v_slc))
    tokens = (
        selected[..., None] * grid.block_size + jnp.arange(grid.block_size, dtype=jnp.int32)[None, None, None]
    )
    seen = (selected >= 0)[..., None] & (tokens <= position[:, None, None, None])
    selected_part = _softmax(rows, k, v, seen.reshape(*seen.shape[:2], -1), grid.scale)

    age = position[:, None] - recent.positions
    near = ((age >= 0) & (age < window) & (recent.positions >= 0))[:, None]
    window_part = _softmax(rows, heads_first(recent.k), heads_first(recent.v), near, grid.scale)
    parts = compressed_part, selected_part, window_part
    outs = [part.out.astype(q.dtype).reshape(batch, 1, heads, -1) for part in parts]
    lse = compressed_part.lse.reshape(batch, 1, heads)
    out = where_finite((recent.num_new > 0)[:, None, None, None], weigh(gates, *outs))
    return out, NsaBranches(outs[0], outs[1], outs[2], lse, indices)


def _blocks(
    grid: SelectionGrid, cache: Cache, kept: Array, selected: Int[Array, "B Hkv n"]
) -> Float[Array, "B Hkv tokens D"]:
    """The tokens of the selected blocks, each KV head's own; zeros for missing ones."""
    outer, inner, kv_heads, dim = kept.shape
    size = inner // grid.block_size
    kept = kept.reshape(outer, size, grid.block_size, kv_heads, dim)
    first, second = address(cache, jnp.where(selected < 0, NOWHERE, selected), size)
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    got = kept.at[first, second, :, head].get(mode="fill", fill_value=0)
    return got.reshape(*selected.shape[:2], -1, dim)


class _Attended(NamedTuple):
    out: Float[Array, "B Hkv G Dv"]
    lse: Float[Array, "B Hkv G"]
    weights: Float[Array, "B Hkv G S"]


def _softmax(
    q: Float[Array, "B Hkv G Dk"],
    k: Float[Array, "B Hkv S Dk"],
    v: Float[Array, "B Hkv S Dv"],
    mask: Array,
    scale: float,
) -> _Attended:
    """Attention under a mask [B, Hkv or 1, S]; 0 and -inf for a query that sees nothing."""
    dtype = accumulator(q.dtype)
    scores = jnp.einsum("bhgd,bhsd->bhgs", q, k, preferred_element_type=dtype)
    scores = jnp.where(mask[:, :, None], scores * scale, -jnp.inf)
    top = finite(jnp.max(scores, axis=-1, initial=-jnp.inf))
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    weights = weights / jnp.where(total > 0, total, 1.0)[..., None]
    v = where_finite(mask[..., None], v)
    out = jnp.einsum("bhgs,bhsd->bhgd", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return _Attended(out, lse, weights)
