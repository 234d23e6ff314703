"""Sparsity at inference only: full attention that reads a part of the text, without training or parameters.

The baselines of Native Sparse Attention (arXiv 2502.11089, table 2), as references: every score is computed
and what a method would not have read is masked, so they are exact, and save nothing. Each reads at most
num_blocks * block_size tokens, its own among them:

* exact_tokens: the tokens with the highest scores, for each query head (the paper's exact-top).
* exact_blocks: the blocks with the most attention, for each query head.
* quest (arXiv 2406.10774, sec. 3.3): the blocks with the highest upper bound of a score, by the least and the
  greatest of each channel of their keys, for each query head. All layers are sparse; Quest leaves two dense.
* infllm (arXiv 2402.04617, sec. 3.2): the blocks whose representative tokens score highest, the same for all
  heads, each head with its own representatives: the tokens of a block that the queries of the next
  (num_local - 1) * block_size positions score highest on average. Positions stay the model's own, and every
  query chooses for itself, not a chunk of them.
* h2o (arXiv 2306.14048, algorithm 1): all tokens until the budget is full; from then on each new token
  displaces the one with the least attention so far, for good, but none of the last num_local * block_size.
  Attention is summed over the query heads that share keys. Every token is read as if it were decoded.

The methods of blocks always read the first num_init blocks and the num_local newest ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.models.config import H2O, BlockSparsity, ExactTokens, InfLLM, Quest, SparsityConfig
from jaxlab.models.selectors import (
    block_bounds,
    block_mass,
    bound_scores,
    by_queries,
    causal_scores,
    in_blocks,
)
from kernels_pallas.nsa import select_blocks_by_importance


def sparse_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    sparsity: SparsityConfig,
    *,
    scale: float,
) -> Float[Array, "B T H Dv"]:
    """Causal attention of whole sequences, one a row, restricted as `sparsity` says.

    Scores and softmax in float32, the output in the dtype of v.
    """
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    shape = (batch, length, heads, v.shape[-1])
    if isinstance(sparsity, H2O):
        return _h2o(q, k, v, sparsity, scale).reshape(shape)
    return _by_query(q, k, v, sparsity, scale).reshape(shape)


def _by_query(q: Array, k: Array, v: Array, sparsity: ExactTokens | BlockSparsity, scale: float) -> Array:
    """Every method that chooses for each query alone."""
    length, size = q.shape[1], sparsity.block_size
    bounds = block_bounds(k, size) if isinstance(sparsity, Quest) else None
    representatives = _representatives(q, k, sparsity) if isinstance(sparsity, InfLLM) else None

    def attend(q: Array, positions: Array) -> Array:
        scores = causal_scores(q, k, positions, scale)
        if isinstance(sparsity, ExactTokens):
            read = _largest(scores, min(sparsity.budget, length))
        else:
            if bounds is not None:
                importance = bound_scores(q, bounds)
            elif representatives is not None:
                importance = jnp.einsum("bthgd,bnhgd->btn", q, representatives)[:, None, None]
            else:
                importance = block_mass(scores, size)
            read = _tokens_of_best(importance, positions, sparsity, length)
        weights = jax.nn.softmax(jnp.where(read, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("bhgts,bshd->bthgd", weights, v)

    return by_queries(attend, q)


def _largest(scores: Float[Array, "*rows S"], count: int) -> Bool[Array, "*rows S"]:
    """Where the `count` largest of each row are; of equals the first."""
    _, at = jax.lax.top_k(scores, count)
    return jnp.put_along_axis(jnp.zeros(scores.shape, bool), at, True, axis=-1, inplace=False)


def _tokens_of_best(
    importance: Float[Array, "B Hkv_ G_ C N"],
    positions: Int[Array, " C"],
    sparsity: BlockSparsity,
    length: int,
) -> Bool[Array, "B Hkv_ G_ C S"]:
    """The tokens of the best blocks of each query and head; an axis of 1 stands for all heads."""
    batch, kv_heads, groups, queries, blocks = importance.shape
    chosen = select_blocks_by_importance(
        importance.reshape(batch, kv_heads * groups, queries, blocks),
        block_size=sparsity.block_size,
        num_blocks=sparsity.num_blocks,
        num_init=sparsity.num_init,
        num_local=sparsity.num_local,
        q_positions=jnp.broadcast_to(positions[None], (batch, queries)),
    )
    # Missing slots, -1, go to a block past the last one.
    chosen = jnp.where(chosen < 0, blocks, chosen)
    none = jnp.zeros((*chosen.shape[:-1], blocks + 1), bool)
    read = jnp.put_along_axis(none, chosen, True, axis=-1, inplace=False)[..., :blocks]
    read = jnp.repeat(read, sparsity.block_size, axis=-1)[..., :length]
    return read.reshape(batch, kv_heads, groups, queries, length)


def _representatives(q: Array, k: Array, sparsity: InfLLM) -> Float[Array, "B N Hkv G Dk"]:
    """The sum of the keys of each block's representative tokens, for each query head.

    A block can be chosen when it is num_local blocks old: the queries that rate its tokens are past then.
    """
    size, length = sparsity.block_size, q.shape[1]
    reach = (sparsity.num_local - 1) * size
    total = jnp.pad(jnp.cumsum(q.astype(jnp.float32), axis=1), ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    first = jnp.arange(1, length + 1)
    last = jnp.minimum(first + reach, length)
    following = (total[:, last] - total[:, first]) / reach
    rating = jnp.einsum("bthgd,bthd->bthg", following, k.astype(jnp.float32))
    rating = jnp.moveaxis(in_blocks(rating, size, constant_values=-jnp.inf), 2, -1)
    chosen = _largest(rating, min(sparsity.representatives, size)).astype(jnp.float32)
    return jnp.einsum("bnhgs,bnshd->bnhgd", chosen, in_blocks(k.astype(jnp.float32), size))


def _h2o(q: Array, k: Array, v: Array, sparsity: H2O, scale: float) -> Array:
    batch, length, kv_heads, _, _ = q.shape
    index = jnp.arange(length)[None, None]
    recent = sparsity.num_local * sparsity.block_size

    def one_query(
        state: tuple[Array, Array], query: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        kept, attention = state
        q, t = query
        kept = kept | (index == t)
        scores = jnp.einsum("bhgd,bshd->bhgs", q, k, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(jnp.where(kept[:, :, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bhgs,bshd->bhgd", weights.astype(v.dtype), v)
        attention = attention + jnp.sum(weights, axis=2)
        # Room for the next token, whose `recent` newest ones, itself included, stay.
        full = jnp.sum(kept, axis=-1, keepdims=True) >= sparsity.budget
        leaving = jnp.where(kept & (index < t + 2 - recent), attention, jnp.inf)
        least = jnp.argmin(leaving, axis=-1, keepdims=True)
        return (kept & ~(full & (index == least)), attention), out

    start = (jnp.zeros((batch, kv_heads, length), bool), jnp.zeros((batch, kv_heads, length), jnp.float32))
    _, out = jax.lax.scan(one_query, start, (jnp.moveaxis(q, 1, 0), jnp.arange(length)))
    return jnp.moveaxis(out, 0, 1)
