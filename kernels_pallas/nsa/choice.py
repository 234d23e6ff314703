"""Choice of the selection blocks: importance of each block to a GQA group, and the best n with the forced
ones.

Scores exist for one chunk of queries at a time; nothing of size T x M or T x N is kept.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.tiling import (
    Places,
    accumulator,
    ceil_div,
    chunk_places,
    finite,
    from_chunks,
    heads_first,
    merge,
    overlap,
    pad_axis,
    query_chunk,
    segment_starts,
    split,
    tile_elements,
    to_chunks,
    where_finite,
)

KEY_TILE = 256
NOWHERE = np.iinfo(np.int32).max


class Grid(NamedTuple):
    """Static sizes of the choice; `kv_len` tokens give ceil(kv_len / block_size) selection blocks."""

    block_len: int
    stride: int
    block_size: int
    num_blocks: int
    num_init: int
    num_local: int
    kv_len: int
    scale: float

    @property
    def candidates(self) -> int:
        return ceil_div(self.kv_len, self.block_size)


def choose(
    grid: Grid,
    q: Float[Array, "B T Hkv G Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T Hkv G"],
    places: Places,
    block_segments: Int[Array, "B M"] | None,
) -> Int[Array, "B Hkv T n"]:
    """Indices of the chosen blocks in ascending order, then -1. `places.key_segments` are those of the
    tokens."""
    batch, length, kv_heads, groups, _ = q.shape
    blocks = k_cmp.shape[1]
    # Tiles of compressed keys start where a selection block starts, so every tile maps onto blocks in the
    # same way.
    unit = grid.block_size // np.gcd(grid.stride, grid.block_size)
    tile_keys = int(unit * max(1, min(KEY_TILE, blocks) // unit))
    spread = _spread(grid, tile_keys)
    tile_blocks = tile_keys * grid.stride // grid.block_size
    padded_blocks = ceil_div(blocks, tile_keys) * tile_blocks + spread.shape[1]
    padded_blocks = max(padded_blocks, grid.candidates)
    if blocks == 0:  # nothing to score, but the loop below needs a tile to be written for
        k_cmp = jnp.zeros((batch, tile_keys, kv_heads, q.shape[-1]), k_cmp.dtype)
    keys = pad_axis(heads_first(k_cmp), 2, tile_keys)
    if block_segments is not None:
        block_segments = pad_axis(block_segments, 1, tile_keys)
    dtype = accumulator(q.dtype)
    chunk = query_chunk(
        length, batch * kv_heads * max(groups * tile_keys, padded_blocks), budget=tile_elements()
    )

    def one_chunk(inputs: tuple[Array, Array, Places, tuple[Array, Array]]) -> Array:
        q_chunk, lse_chunk, here, limits = inputs
        rows, floor = merge(heads_first(q_chunk), 2), merge(heads_first(finite(lse_chunk)), 2)

        def one_tile(tile: Array, importance: Array) -> Array:
            index = tile * tile_keys + jnp.arange(tile_keys, dtype=jnp.int32)
            ends = index * grid.stride + grid.block_len - 1
            mask = ends[None, None, :] <= here.q_positions[:, :, None]
            mask &= (index < blocks)[None, None, :]
            if block_segments is not None and here.q_segments is not None:
                segments = lax.dynamic_slice_in_dim(block_segments, tile * tile_keys, tile_keys, axis=1)
                mask &= (here.q_segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
            k_tile = lax.dynamic_slice_in_dim(keys, tile * tile_keys, tile_keys, axis=2)
            scores = jnp.einsum("bhrd,bhsd->bhrs", rows, k_tile, preferred_element_type=dtype)
            shares = split(jnp.exp(scores * grid.scale - floor[..., None]), 2, groups)
            # Summed over the group before the mask: one mask for all of its heads.
            shares = where_finite(mask[:, None], jnp.sum(shares, axis=3))
            added = jnp.einsum("bhts,sn->bhtn", shares, jnp.asarray(spread, dtype))
            start = tile * tile_blocks
            here_now = lax.dynamic_slice_in_dim(importance, start, spread.shape[1], axis=3)
            return lax.dynamic_update_slice_in_dim(importance, here_now + added, start, axis=3)

        last = (jnp.max(here.q_positions) - grid.block_len + 1) // grid.stride
        tiles = -(-jnp.clip(last + 1, 0, blocks) // tile_keys)
        importance = jnp.zeros((batch, kv_heads, q_chunk.shape[1], padded_blocks), dtype)
        importance = lax.fori_loop(jnp.zeros_like(tiles), tiles, one_tile, importance)
        return heads_first(best(importance, limits, grid.num_blocks, grid.num_init, grid.num_local))

    chunked = (to_chunks(q, chunk), to_chunks(lse, chunk), chunk_places(places, chunk))
    first, newest = candidates(grid.block_size, places)
    limits = (to_chunks(first, chunk, fill=None), to_chunks(newest, chunk, fill=None))
    return heads_first(from_chunks(lax.map(one_chunk, (*chunked, limits)), length))


def _spread(grid: Grid, tile_keys: int) -> np.ndarray:
    """Eq. 9 in overlap form: [tile_keys, blocks], tokens that a compressed block shares with a selection
    block, counted in strides (for 32/16/64: 1, 2, 2, 2, 1)."""
    blocks = ceil_div((tile_keys - 1) * grid.stride + grid.block_len, grid.block_size)
    shared = [
        [
            overlap(i * grid.stride, grid.block_len, j * grid.block_size, grid.block_size) / grid.stride
            for j in range(blocks)
        ]
        for i in range(tile_keys)
    ]
    return np.asarray(shared)


def spread_over_blocks(grid: Grid, shares: Float[Array, "B Hkv T M"]) -> Float[Array, "B Hkv T N"]:
    """The same of all compressed blocks at once: a block's importance is the shares of those that overlap it,
    each times the tokens in common, counted in strides. A few taps, added in full float32."""
    blocks = np.arange(grid.candidates)
    lowest = np.maximum(0, -(-(blocks * grid.block_size - grid.block_len + 1) // grid.stride))
    taps = (grid.block_size + grid.block_len - 2) // grid.stride + 1
    total = jnp.zeros((*shares.shape[:3], grid.candidates), shares.dtype)
    for tap in range(taps):
        index = lowest + tap
        shared = [
            overlap(i * grid.stride, grid.block_len, j * grid.block_size, grid.block_size) / grid.stride
            for i, j in zip(index.tolist(), blocks.tolist(), strict=True)
        ]
        inside = index < shares.shape[-1]
        weight = np.where(inside, shared, 0.0).astype(np.float32)
        taken = shares[..., np.where(inside, index, 0)]
        total = total + taken * jnp.asarray(weight)[None, None, None]
    return total


def candidates(block_size: int, places: Places) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First and newest candidate block of each query: those of its segment's first token and of its own
    position."""
    newest = places.q_positions // block_size
    if places.q_segments is None or places.key_segments is None:
        return jnp.zeros_like(newest), newest
    starts = segment_starts(places.key_segments)
    first = jnp.take_along_axis(starts, places.q_positions, axis=1) // block_size
    # A padding query chooses nothing.
    return first, jnp.where(places.q_segments == 0, first - 1, newest)


def prioritised(
    importance: Float[Array, "B Hkv T blocks"],
    limits: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    num_init: int,
    num_local: int,
) -> Float[Array, "B Hkv T blocks"]:
    """Importance with inf for the blocks that are always chosen and -inf for those that are no candidates."""
    first, newest = (x[:, None, :, None] for x in limits)
    index = jnp.arange(importance.shape[-1], dtype=jnp.int32)[None, None, None, :]
    forced = (index < first + num_init) | (index > newest - num_local)
    importance = jnp.where(forced, jnp.inf, importance)
    return jnp.where((index >= first) & (index <= newest), importance, -jnp.inf)


def best(
    importance: Float[Array, "B Hkv T blocks"],
    limits: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    num_blocks: int,
    num_init: int,
    num_local: int,
) -> Int[Array, "B Hkv T n"]:
    """The best blocks by finite importance, in ascending order, then -1; `limits` are each query's first and
    newest candidate."""
    importance = prioritised(importance, limits, num_init, num_local)
    index = jnp.arange(importance.shape[-1], dtype=jnp.int32)[None, None, None, :]

    # Rounds of taking the best, the lowest index among equals. Unlike top_k, which is a call that cannot be
    # partitioned, they leave a batch that is spread over devices where it is.
    def one_round(slot: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, chosen = state
        most = jnp.max(left, axis=-1, keepdims=True)
        at = jnp.min(jnp.where(left == most, index, NOWHERE), axis=-1, keepdims=True)
        chosen = lax.dynamic_update_slice_in_dim(
            chosen, jnp.where(most > -jnp.inf, at, NOWHERE), slot, axis=3
        )
        return jnp.where(index == at, -jnp.inf, left), chosen

    chosen = jnp.full((*importance.shape[:3], num_blocks), NOWHERE, jnp.int32)
    _, chosen = lax.fori_loop(0, num_blocks, one_round, (importance, chosen))
    chosen = jnp.sort(chosen, axis=-1)
    return jnp.where(chosen == NOWHERE, -1, chosen)
