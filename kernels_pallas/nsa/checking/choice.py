"""When a choice of blocks is right: written from the definitions (Eq. 9 and 10), by none of the operators."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.specs.arg_specs import ArgSpec

NEAR = 1e-3
"""Blocks whose importance differs by less of its size may stand for each other: rounding decides."""


def importance(
    spec: ArgSpec,
    q: Float[Array, "B T H Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B Hkv T N"]:
    """Of each selection block to each query, in float32; for rows of one text."""
    batch, length, _, dim = q.shape
    blocks, kv_heads = k_cmp.shape[1:3]
    rows = q.astype(jnp.float32).reshape(batch, length, kv_heads, -1, dim)
    keys = k_cmp.astype(jnp.float32)
    scores = jnp.einsum("bthgd,bmhd->bhgtm", rows, keys, precision="highest") * dim**-0.5
    ends = jnp.arange(blocks, dtype=jnp.int32) * spec.stride + spec.block_len - 1
    seen = (ends[None, None] <= positions[:, :, None])[:, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0.0)
    tokens = np.zeros((blocks, -(-spec.length // spec.block_size)), np.float32)
    for i in range(blocks):
        for token in range(i * spec.stride, min(i * spec.stride + spec.block_len, spec.length)):
            tokens[i, token // spec.block_size] += 1 / spec.stride
    return jnp.einsum("bhtm,mn->bhtn", weights.sum(axis=2), jnp.asarray(tokens), precision="highest")


def wrong_choices(
    spec: ArgSpec, indices: np.ndarray, importance: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """bool [B, Hkv, T] each: choices that are wrong, and those that leave blocks out.

    Right are: ascending, then -1; all forced blocks; as many as there is place for; of the others none that
    is worth less than one that was left out, but for near-ties.
    """
    blocks = np.arange(importance.shape[-1])
    newest = (positions // spec.block_size)[:, None, :, None]
    candidate = np.broadcast_to(blocks <= newest, importance.shape)
    forced = candidate & ((blocks < spec.num_init) | (blocks > newest - spec.num_local))
    there = (indices >= 0) & (indices < len(blocks))
    chosen = np.zeros(importance.shape, bool)
    np.put_along_axis(chosen, np.where(there, indices, 0), there, axis=-1)
    # A missing slot, put in as a False at block 0, may have come after block 0 itself.
    chosen[..., 0] = (there & (indices == 0)).any(axis=-1)
    missing = np.where(indices == -1, np.iinfo(np.int32).max, indices)
    ascending = (np.diff(missing, axis=-1) > 0) | (indices[..., 1:] == -1)
    wanted = np.minimum(spec.num_blocks, candidate.sum(axis=-1))
    wrong = ~ascending.all(axis=-1) | (~there & (indices != -1)).any(axis=-1)
    wrong |= (chosen & ~candidate).any(axis=-1) | (forced & ~chosen).any(axis=-1)
    wrong |= there.sum(axis=-1) != wanted
    least = np.where(chosen & ~forced, importance, np.inf).min(axis=-1)
    best_left = np.where(candidate & ~chosen, importance, -np.inf).max(axis=-1)
    wrong |= best_left * (1 - NEAR) > least
    return wrong, candidate.sum(axis=-1) > spec.num_blocks
