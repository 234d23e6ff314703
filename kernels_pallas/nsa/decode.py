"""Attention of a chunk's queries over a cache: what `nsa_attention` gives for them on the whole sequence.

A single query (decoding) reads the compressed keys, the chosen blocks and its window, and nothing else: of
the selection keys n blocks, whatever the length. A longer chunk (prefill) runs the tiled functions of api.py.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.api import (
    NsaBranches,
    compressed_attention,
    select_blocks,
    selected_attention,
    weigh,
    window_attention,
)
from kernels_pallas.nsa.cache import NOWHERE, PIECE, TILE, Cache, PagedCache, Recent, address, whole
from kernels_pallas.nsa.choice import Grid, best, spread_over_blocks
from kernels_pallas.nsa.compression import num_compressed
from kernels_pallas.nsa.support import Implementation, reason_against, uses_kernels
from kernels_pallas.nsa.tiling import (
    accumulator,
    default_scale,
    finite,
    heads_first,
    where_finite,
)


def cached_attention(
    cache: Cache,
    recent: Recent,
    q: Float[Array, "B T H Dk"],
    gates: Float[Array, "B T H 3"],
    *,
    block_len: int = 32,
    stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    num_init: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
    indices: Int[Array, "B Hkv T n"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H Dv"], NsaBranches]:
    """Attention of the T tokens that `append_tokens` put in last; it returned `cache` and `recent`.

    `indices` replaces the choice of blocks. The sizes are those of the cache; dtypes and `implementation` as
    in api.py. Queries of padding get exactly 0. Returns what `nsa_attention` returns. Raises ValueError for
    shapes or sizes that do not fit, NotImplementedError for an implementation that cannot take the case.
    """
    count, ring = q.shape[1], cache.k_win.shape[1]
    if recent.k.shape[1] != ring + (count if count > 1 else 0) or ring != window:
        raise ValueError(
            f"{count} queries and a window of {window} do not fit {recent.k.shape[1]} recent keys and a "
            f"cache with {ring} slots of the window"
        )
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates have shape {gates.shape}; for q {q.shape} it must be {(*q.shape[:3], 3)}")
    length = cache.k_slc.shape[1]
    if isinstance(cache, PagedCache):
        length *= cache.page_table.shape[1]
    scale = default_scale(scale, q.shape[-1])
    grid = Grid(block_len, stride, block_size, num_blocks, num_init, num_local, length, scale)
    if count > 1:
        branches = _many(grid, cache, recent, q, window, indices, implementation)
    elif uses_kernels(implementation, "cached_attention of one token", _reason_against(q, cache, block_size)):
        from kernels_pallas.nsa import mosaic_cached

        branches = mosaic_cached.one_token(grid, cache, recent.num_new, q, indices)
    else:
        branches = _one(grid, cache, recent, q, window, indices)
    out = weigh(gates, branches.compressed, branches.selected, branches.window)
    padding = jnp.arange(count, dtype=jnp.int32)[None] >= recent.num_new[:, None]
    return where_finite(~padding[:, :, None, None], out), branches


def _reason_against(q: Array, cache: Cache, block_size: int) -> str | None:
    """Why the kernel cannot take one token of every sequence; None if it can."""
    dims = cache.k_slc.shape[-1], cache.v_slc.shape[-1]
    if dims[0] % TILE or dims[1] % TILE:
        return f"head dims {dims[0]}/{dims[1]} of a cache must be multiples of {TILE}"
    if cache.k_win.shape[1] % TILE:
        return f"a window of {cache.k_win.shape[1]} is no multiple of {TILE}"
    if isinstance(cache, PagedCache) and math.gcd(cache.k_cmp.shape[1], TILE) < PIECE:
        return (
            f"{cache.k_cmp.shape[1]} compressed blocks a page do not make up tiles of {TILE}: "
            f"take pages of a multiple of {PIECE} strides"
        )
    return reason_against(q, cache.v_win, cache.k_slc.shape[1], block_size)


def _many(
    grid: Grid,
    cache: Cache,
    recent: Recent,
    q: Array,
    window: int,
    indices: Array | None,
    implementation: Implementation | None,
) -> NsaBranches:
    k_cmp, v_cmp = _compressed(grid, cache)
    ring, count = cache.k_win.shape[1], q.shape[1]
    held = jnp.arange(grid.kv_len, dtype=jnp.int32)[None] < cache.length[:, None]
    rows = (cache.length - recent.num_new)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    common: dict[str, Any] = {
        "scale": grid.scale,
        "segment_ids": held.astype(jnp.int32),
        "q_positions": jnp.minimum(rows, grid.kv_len - 1),
        "implementation": implementation,
    }
    blocks: dict[str, Any] = {"block_len": grid.block_len, "stride": grid.stride}
    compressed, lse = compressed_attention(q, k_cmp, v_cmp, **blocks, **common)
    if indices is None:
        indices = select_blocks(
            q,
            k_cmp,
            lse,
            block_size=grid.block_size,
            num_blocks=grid.num_blocks,
            num_init=grid.num_init,
            num_local=grid.num_local,
            kv_len=grid.kv_len,
            **blocks,
            **common,
        )
    k, v = whole(cache, cache.k_slc), whole(cache, cache.v_slc)
    selected = selected_attention(q, k, v, indices, block_size=grid.block_size, **common)
    # Within `recent` the chunk's first query stands after the ring.
    places = jnp.broadcast_to(ring + jnp.arange(count, dtype=jnp.int32)[None], q.shape[:2])
    held_recently = (recent.positions >= 0).astype(jnp.int32)
    near = window_attention(
        q,
        recent.k,
        recent.v,
        window=window,
        **(common | {"segment_ids": held_recently, "q_positions": places}),
    )
    return NsaBranches(compressed, selected, near, lse, indices)


def _one(
    grid: Grid,
    cache: Cache,
    recent: Recent,
    q: Array,
    window: int,
    indices: Array | None,
) -> NsaBranches:
    k_cmp, v_cmp = _compressed(grid, cache)
    batch, _, heads, dim = q.shape
    kv_heads = recent.k.shape[2]
    rows = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    # A sequence that added no token has no query: it sees nothing.
    position = jnp.where(recent.num_new > 0, cache.length - 1, -1)

    ends = jnp.arange(k_cmp.shape[1], dtype=jnp.int32) * grid.stride + grid.block_len - 1
    visible = (ends[None] <= position[:, None])[:, None]
    compressed = _softmax(rows, heads_first(k_cmp), heads_first(v_cmp), visible, grid.scale)
    if indices is None:
        importance = spread_over_blocks(grid, jnp.sum(compressed.weights, axis=2)[:, :, None])
        newest = (position // grid.block_size)[:, None]
        limits = (jnp.zeros_like(newest), newest)
        indices = best(importance, limits, grid.num_blocks, grid.num_init, grid.num_local)

    chosen = indices[:, :, 0]
    k, v = (_blocks(grid, cache, x, chosen) for x in (cache.k_slc, cache.v_slc))
    tokens = (
        chosen[..., None] * grid.block_size + jnp.arange(grid.block_size, dtype=jnp.int32)[None, None, None]
    )
    seen = (chosen >= 0)[..., None] & (tokens <= position[:, None, None, None])
    selected = _softmax(rows, k, v, seen.reshape(*seen.shape[:2], -1), grid.scale)

    age = position[:, None] - recent.positions
    near = ((age >= 0) & (age < window) & (recent.positions >= 0))[:, None]
    window_part = _softmax(rows, heads_first(recent.k), heads_first(recent.v), near, grid.scale)
    outs = [
        part.out.astype(q.dtype).reshape(batch, 1, heads, -1) for part in (compressed, selected, window_part)
    ]
    return NsaBranches(outs[0], outs[1], outs[2], compressed.lse.reshape(batch, 1, heads), indices)


def _compressed(grid: Grid, cache: Cache) -> tuple[Float[Array, "B M Hkv Dk"], Float[Array, "B M Hkv Dv"]]:
    blocks = num_compressed(grid.kv_len, grid.block_len, grid.stride)
    return whole(cache, cache.k_cmp)[:, :blocks], whole(cache, cache.v_cmp)[:, :blocks]


def _blocks(
    grid: Grid, cache: Cache, kept: Array, chosen: Int[Array, "B Hkv n"]
) -> Float[Array, "B Hkv tokens D"]:
    """The tokens of the chosen blocks, each KV head's own; zeros for missing ones."""
    outer, inner, kv_heads, dim = kept.shape
    size = inner // grid.block_size
    kept = kept.reshape(outer, size, grid.block_size, kv_heads, dim)
    first, second = address(cache, jnp.where(chosen < 0, NOWHERE, chosen), size)
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    got = kept.at[first, second, :, head].get(mode="fill", fill_value=0)
    return got.reshape(*chosen.shape[:2], -1, dim)


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
