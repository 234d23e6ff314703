"""One token of every sequence over a cache by the Hopper kernel: two launches, the choice between them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.api import NsaBranches
from kernels_pallas.nsa.cache import Cache, PagedCache
from kernels_pallas.nsa.choice import Grid, spread_over_blocks
from kernels_pallas.nsa.compression import num_compressed
from kernels_pallas.nsa.mosaic_choice import ascending, top_blocks
from kernels_pallas.nsa.mosaic_decode import HEADS, KEYS, Kept, attend_to_kept, join
from kernels_pallas.nsa.mosaic_forward import LOG2_E
from kernels_pallas.nsa.tiling import ceil_div, pad_axis


def one_token(
    grid: Grid,
    cache: Cache,
    num_new: Int[Array, " B"],
    q: Float[Array, "B 1 H Dk"],
    indices: Int[Array, "B Hkv 1 n"] | None,
) -> NsaBranches:
    """The branches of the newest token of each sequence, which the cache holds already."""
    batch, _, heads, dim = q.shape
    kv_heads = cache.k_slc.shape[2]
    group = heads // kv_heads
    position = jnp.where(num_new > 0, cache.length - 1, -1)
    rows = pad_axis(q.reshape(batch * kv_heads, group, dim), 1, HEADS)
    pages = cache.page_table if isinstance(cache, PagedCache) else None

    blocks = num_compressed(grid.kv_len, grid.block_len, grid.stride)
    visible = jnp.clip((position + 1 - grid.block_len) // grid.stride + 1, 0, blocks)
    kept = Kept(cache.k_cmp, cache.v_cmp, visible, pages, None, max(1, ceil_div(blocks, KEYS)))
    (found,), scores = attend_to_kept(rows, [kept], scale=grid.scale, keep_scores=indices is None)
    compressed, lse = join(found)
    if scores is not None:
        seen = jnp.arange(scores.shape[1], dtype=jnp.int32)[None] < jnp.repeat(visible, kv_heads)[:, None]
        weights = jnp.where(seen[..., None], jnp.exp2(scores - lse[:, None]), 0.0)
        shares = jnp.sum(weights[..., :group], axis=-1).reshape(batch, kv_heads, 1, -1)
        newest = (position // grid.block_size)[:, None]
        limits = (jnp.zeros_like(newest), newest)
        chosen = top_blocks(grid, spread_over_blocks(grid, shares), limits)
        indices = ascending(chosen)
    else:
        assert indices is not None
        chosen = indices

    parts = grid.block_size // KEYS
    part = jnp.arange(parts, dtype=jnp.int32)[None, None]
    tiles = (chosen.reshape(batch * kv_heads, -1, 1) * parts + part).reshape(batch * kv_heads, -1)
    present, ring = position + 1, cache.k_win.shape[1]
    branches = [
        Kept(cache.k_slc, cache.v_slc, present, pages, tiles, grid.kv_len // KEYS),
        Kept(cache.k_win, cache.v_win, jnp.minimum(present, ring), None, None, ring // KEYS),
    ]
    (selected, recent), _ = attend_to_kept(rows, branches, scale=grid.scale)

    def finish(out: Float[Array, "X G Dv"]) -> Float[Array, "B 1 H Dv"]:
        return out[:, :group].astype(q.dtype).reshape(batch, 1, heads, -1)

    outs = [finish(out) for out in (compressed, join(selected)[0], join(recent)[0])]
    natural = (lse[:, :group] / LOG2_E).reshape(batch, 1, heads)
    return NsaBranches(outs[0], outs[1], outs[2], natural, indices)
