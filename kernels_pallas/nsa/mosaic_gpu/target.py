"""Where the Hopper kernels may run, and which calls they take. Imports no Pallas."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.nsa.decode_cache import PIECE, TILE, Cache, PagedCache
from kernels_pallas.nsa.interface import Case
from kernels_pallas.target import OLDEST_JAX, current_target, is_hopper

MAX_GROUP, MAX_KEY_DIM, MAX_VALUE_DIM, BLOCK = 64, 192, 128, 64
"""Compiled for Hopper without spilled registers up to these head dims."""


def reason_against(case: Case) -> str | None:
    """Why the Hopper kernels cannot take a call; None if they can."""
    q, k, v, block_size = case.q, case.k, case.v, case.block_size
    if case.cache is not None and (reason := _reason_against_cache(case.cache)) is not None:
        return reason
    key_dim, value_dim, group = q.shape[3], 0 if v is None else v.shape[3], q.shape[2] // k.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"wgmma takes bfloat16 and float16 (float32 would be rounded to TF32), not {q.dtype}"
    if key_dim > MAX_KEY_DIM or value_dim > MAX_VALUE_DIM:
        dims = key_dim if v is None else f"{key_dim}/{value_dim}"
        return f"head dims {dims} are above {MAX_KEY_DIM}/{MAX_VALUE_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads share a key/value head; at most {MAX_GROUP} may"
    if block_size is not None and block_size % BLOCK:
        return f"block_size {block_size} is no multiple of {BLOCK}"
    if not q.size or not k.shape[1]:
        return "there are no queries or no keys"
    if jax.__version_info__ < OLDEST_JAX:
        return f"they need jax {'.'.join(map(str, OLDEST_JAX))} or newer, not {jax.__version__}"
    if current_target() == "device" and not is_hopper():
        return "the default device is no Hopper GPU"
    return None


def _reason_against_cache(cache: Cache) -> str | None:
    """Decoding does not copy a cache to pad it."""
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
    return None
