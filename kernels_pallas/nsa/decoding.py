"""Attention of a chunk's queries over a cache: what `nsa_attention` gives for them on the whole sequence.

A single query (decoding) reads the compressed keys, the selected blocks and its window, and nothing else: of
the selection keys n blocks, whatever the length. A longer chunk (prefill) runs the tiled functions of api.py.
"""

from typing import Any, Unpack

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.api import (
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.base import (
    NsaBranches,
    NsaSizes,
    SelectionGrid,
    SizeOptions,
    weigh,
    where_finite,
)
from kernels_pallas.nsa.checks import check_attention, check_gates, check_indices_shape, check_selection
from kernels_pallas.nsa.decode_cache import Cache, Recent, capacity, check_cache, compressed_keys, whole
from kernels_pallas.nsa.implementations import Implementation, operators_for
from kernels_pallas.nsa.interface import Case

ONE_TOKEN = "cached_attention of one token"
"""Name of the call that an implementation may take."""


def cached_attention(
    cache: Cache,
    recent: Recent,
    q: Float[Array, "B T H Dk"],
    gates: Float[Array, "B T H 3"],
    *,
    indices: Int[Array, "B Hkv T n"] | None = None,
    implementation: Implementation | None = None,
    **sizes: Unpack[SizeOptions],
) -> tuple[Float[Array, "B T H Dv"], NsaBranches]:
    """Attention of the T tokens that `append_tokens` put in last; it returned `cache` and `recent`.

    `indices` replaces the selection of blocks. `sizes` are the fields of `NsaSizes` and those of the cache;
    dtypes and `implementation` as in api.py. Queries of padding get exactly 0. Returns what `nsa_attention`
    returns.

    Raises:
        ValueError: shapes or sizes do not fit.
        NotImplementedError: the named implementation cannot take the case.
    """
    n, count, ring = NsaSizes(**sizes), q.shape[1], cache.k_win.shape[1]
    if recent.k.shape[1] != ring + (count if count > 1 else 0) or ring != n.window:
        raise ValueError(
            f"{count} queries and a window of {n.window} do not fit {recent.k.shape[1]} recent keys and a "
            f"cache with {ring} slots of the window"
        )
    check_cache(cache, n.block_len, n.stride, n.block_size)
    check_gates(gates, q)
    check_attention(q, (("k_win of the cache", cache.k_win), ("v_win of the cache", cache.v_win)))
    check_selection(n.block_size, n.num_blocks, n.num_init, n.num_local)
    if indices is not None:
        check_indices_shape(indices, q, cache.k_win)
    grid, window = n.grid(capacity(cache), q.shape[-1]), n.window
    if count == 1:
        case = Case(ONE_TOKEN, q, cache.k_slc, cache.v_slc, n.block_size, cache)
        operators = operators_for(case, implementation)
        return operators.decode_token(grid, cache, recent, q, gates, window, indices)
    branches = _chunk(grid, cache, recent, q, window, indices, implementation)
    out = weigh(gates, branches.compressed, branches.selected, branches.window)
    padding = jnp.arange(count, dtype=jnp.int32)[None] >= recent.num_new[:, None]
    return where_finite(~padding[:, :, None, None], out), branches


def _chunk(
    grid: SelectionGrid,
    cache: Cache,
    recent: Recent,
    q: Array,
    window: int,
    indices: Array | None,
    implementation: Implementation | None,
) -> NsaBranches:
    k_cmp, v_cmp = compressed_keys(cache, grid)
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
    positions = jnp.broadcast_to(ring + jnp.arange(count, dtype=jnp.int32)[None], q.shape[:2])
    held_recently = (recent.positions >= 0).astype(jnp.int32)
    near = window_attention(
        q,
        recent.k,
        recent.v,
        window=window,
        **(common | {"segment_ids": held_recently, "q_positions": positions}),
    )
    return NsaBranches(compressed, selected, near, lse, indices)
