"""What selection blocks are worth to a query (Eq. 9 and 10), which may be selected, and the best of them.

Attention to compressed keys, summed over the heads of a group (Eq. 10), is spread over the selection blocks
that they overlap (Eq. 9). Both implementations and decoding select from here. Blocks are counted from the
start of the query's text; `newest` is the one of the query itself, -1 for a query that selects nothing.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import (
    NOWHERE,
    Positions,
    SelectionGrid,
    ceil_div,
    is_padding,
    overlap,
    text_starts,
)


def overlap_weights(grid: SelectionGrid, tile_keys: int) -> np.ndarray:
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


def block_importance(
    grid: SelectionGrid, shares: Float[Array, "B Hkv T M"], first: Int[Array, "B T"] | None = None
) -> Float[Array, "B Hkv T N"]:
    """Eq. 9 for all compressed blocks at once: a block's importance is the shares of those that overlap it,
    each times the tokens in common, counted in strides. A few taps, added in full float32.

    `first` is the slot of the first compressed block of each query's text (None: 0); shares are 0 in the
    slots of other texts.
    """
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
        if first is None:
            taken = shares[..., np.where(inside, index, 0)]
        else:
            slot = first[:, None, :, None] + jnp.asarray(index, jnp.int32)[None, None, None]
            taken = jnp.take_along_axis(shares, slot, axis=3, mode="fill", fill_value=0)
        total = total + taken * jnp.asarray(weight)[None, None, None]
    return total


def newest_candidates(block_size: int, positions: Positions) -> Int[Array, "B T"]:
    """The block of each query's own position, counted from the start of its text; -1 for padding."""
    own = (positions.q_positions - text_starts(positions)) // block_size
    return jnp.where(is_padding(positions), -1, own)


def with_forced_blocks(
    importance: Float[Array, "B Hkv T blocks"],
    newest: Int[Array, "B T"],
    num_init: int,
    num_local: int,
) -> Float[Array, "B Hkv T blocks"]:
    """Importance with inf for blocks that are always selected, -inf for those that are no candidates."""
    newest = newest[:, None, :, None]
    index = jnp.arange(importance.shape[-1], dtype=jnp.int32)[None, None, None, :]
    forced = (index < num_init) | (index > newest - num_local)
    importance = jnp.where(forced, jnp.inf, importance)
    return jnp.where(index <= newest, importance, -jnp.inf)


def select_by_rounds(
    importance: Float[Array, "B Hkv T blocks"],
    newest: Int[Array, "B T"],
    num_blocks: int,
    num_init: int,
    num_local: int,
) -> Int[Array, "B Hkv T n"]:
    """The best blocks by finite importance, in ascending order, then -1."""
    importance = with_forced_blocks(importance, newest, num_init, num_local)
    index = jnp.arange(importance.shape[-1], dtype=jnp.int32)[None, None, None, :]

    # Rounds of taking the best, the lowest index among equals. Unlike top_k, which is a call that cannot be
    # partitioned, they leave a batch that is spread over devices where it is.
    def one_round(slot: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, selected = state
        most = jnp.max(left, axis=-1, keepdims=True)
        at = jnp.min(jnp.where(left == most, index, NOWHERE), axis=-1, keepdims=True)
        selected = lax.dynamic_update_slice_in_dim(
            selected, jnp.where(most > -jnp.inf, at, NOWHERE), slot, axis=3
        )
        return jnp.where(index == at, -jnp.inf, left), selected

    selected = jnp.full((*importance.shape[:3], num_blocks), NOWHERE, jnp.int32)
    _, selected = lax.fori_loop(0, num_blocks, one_round, (importance, selected))
    selected = jnp.sort(selected, axis=-1)
    return jnp.where(selected == NOWHERE, -1, selected)


def select_by_top_k(
    grid: SelectionGrid,
    importance: Float[Array, "B Hkv T N"],
    newest: Int[Array, "B T"],
) -> Int[Array, "B Hkv T n"]:
    """As `select_by_rounds`, in one call of top_k; the best one first. An accelerator does it sooner."""
    importance = with_forced_blocks(importance, newest, grid.num_init, grid.num_local)
    if importance.shape[-1] < grid.num_blocks:
        missing = grid.num_blocks - importance.shape[-1]
        importance = jnp.pad(importance, ((0, 0),) * 3 + ((0, missing),), constant_values=-np.inf)
    best, selected = lax.top_k(importance, grid.num_blocks)  # of equals the lower index
    return jnp.where(best > -jnp.inf, selected, -1)


def ascending(selected: Int[Array, "*dims n"]) -> Int[Array, "*dims n"]:
    """Missing slots, -1, come last."""
    selected = jnp.sort(jnp.where(selected < 0, NOWHERE, selected), axis=-1)
    return jnp.where(selected == NOWHERE, -1, selected)
