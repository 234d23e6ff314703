"""Selected blocks with a given likeness between neighbouring queries, to time and count selection with."""

import numpy as np

from kernels_pallas.nsa.specs.arg_specs import ArgSpec

LIFE = 16
"""Blocks that a walk lasts before it draws anew from all that are there by then."""


def overlapping_indices(spec: ArgSpec, overlap: float, seed: int = 0) -> np.ndarray:
    """int32 [B, Hkv, T, n], ascending, then -1: the first `num_init` blocks, the newest `num_local`, and free
    ones of which a share `overlap` is kept from one query to the next.

    A query's free blocks are neighbours on a ring of all old blocks in random order; the next query's lie
    further along by as many as are replaced. So they are distinct, and what is new was not there before while
    the ring is long enough; near the beginning, where there is little to select from, more is kept.

    Raises:
        ValueError: the overlap is outside of 0 ... 1.
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap must be between 0 and 1, not {overlap}")
    random = np.random.default_rng(seed)
    rows, size = spec.batch * spec.kv_heads, spec.block_size
    indices = np.full((rows, spec.length, spec.num_blocks), -1, np.int32)
    start = 0
    while start * size < spec.length:
        life = LIFE if start >= 4 * spec.num_blocks else 1
        here = np.arange(start * size, min((start + life) * size, spec.length))
        newest = here // size
        local = newest[:, None] - np.arange(spec.num_local)[None]
        first = np.broadcast_to(np.arange(spec.num_init)[None], (len(here), spec.num_init))
        first = np.where(first <= newest[:, None] - spec.num_local, first, -1)
        forced = np.concatenate([first, local], axis=1)
        ring = np.arange(spec.num_init, max(spec.num_init, start - spec.num_local + 1))
        wanted = min(spec.num_blocks - spec.num_init - spec.num_local, len(ring))
        selected = np.full((rows, len(here), spec.num_blocks), -1, np.int32)
        selected[..., : forced.shape[1]] = forced
        if wanted:
            order = random.permuted(np.tile(ring, (rows, 1)), axis=1)
            at = np.cumsum(random.binomial(wanted, 1 - overlap, (rows, len(here))), axis=1)
            at = (at[..., None] + np.arange(wanted)) % len(ring)
            free = np.take_along_axis(order, at.reshape(rows, -1), axis=1).reshape(at.shape)
            selected[..., forced.shape[1] : forced.shape[1] + wanted] = free
        missing = np.iinfo(np.int32).max
        selected = np.sort(np.where(selected < 0, missing, selected), axis=2)
        indices[:, here] = np.where(selected == missing, -1, selected)
        start += life
    return indices.reshape(spec.batch, spec.kv_heads, spec.length, spec.num_blocks)
