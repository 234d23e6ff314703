"""What selection blocks are worth to a query: bounds of scores, true attention, and a scorer trained beside.

The choice from these numbers is `kernels_pallas.nsa.select_blocks_by_importance`. Block j holds tokens
[j * size, (j + 1) * size) of a text; the last one may be shorter. Scores of queries and tokens exist for a
chunk of queries at a time. The indexer has a file of its own (indexer.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig, NSAConfig
from jaxlab.models.initializer import Initializer

CHUNK_ELEMENTS = 1 << 22
"""Scores that are alive at once."""


class Bounds(NamedTuple):
    """The least and the greatest of each channel of a block's keys."""

    low: Float[Array, "B N Hkv Dk"]
    high: Float[Array, "B N Hkv Dk"]


def block_bounds(k: Float[Array, "B S Hkv Dk"], size: int) -> Bounds:
    """Bounds of the keys of each block."""
    blocks = in_blocks(k, size, mode="edge")
    return Bounds(jnp.min(blocks, axis=2), jnp.max(blocks, axis=2))


def bound_scores(q: Float[Array, "B T Hkv G Dk"], bounds: Bounds) -> Float[Array, "B Hkv G T N"]:
    """The sum over channels of max(q * low, q * high): no key of the block scores higher. float32.

    Source: Quest, arXiv 2406.10774, section 3.3.
    """
    dot = lambda x, y: jnp.einsum("bthgd,bnhd->bhgtn", x, y, preferred_element_type=jnp.float32)
    return dot(jnp.maximum(q, 0), bounds.high) + dot(jnp.minimum(q, 0), bounds.low)


def packed_bound_scores(
    q: Float[Array, "B T Hkv G Dk"], k: Float[Array, "B T Hkv Dk"], segment_ids: Int[Array, "B T"], size: int
) -> Float[Array, "B Hkv T N"]:
    """`bound_scores` of packed texts, summed over a group: of the blocks of each query's own text, counted
    from its start. No gradient reaches q and k.

    Blocks begin anywhere and there is no small bound for their number, so those that there are go by in
    tiles, and each query keeps the ones of its text.
    """
    q, k = jax.lax.stop_gradient((q, k))
    batch, length = segment_ids.shape
    row = jnp.arange(length, dtype=jnp.int32)[None]
    text = row_of_text(segment_ids)
    begins = (row - text) % size == 0
    number = jnp.cumsum(begins.astype(jnp.int32), axis=1) - 1
    starts = jnp.sort(jnp.where(begins, row, length), axis=1)  # of block 0, 1, ... of the whole row
    first = jnp.take_along_axis(number, text, axis=1)
    blocks, tile_size = -(-length // size), 64
    starts = jnp.pad(starts, ((0, 0), (0, -length % tile_size)), constant_values=length)
    inside = jnp.arange(size, dtype=jnp.int32)[None, None]

    def add_tile(tile: Array, scores: Array) -> Array:
        at = jax.lax.dynamic_slice_in_dim(starts, tile * tile_size, tile_size, axis=1)
        token = jnp.minimum(at[..., None] + inside, length - 1)
        origin = jnp.minimum(at, length - 1)
        same = jax.vmap(lambda x, i, j: x[i] == x[j][:, None])(text, token, origin)
        token = jnp.where(same, token, origin[..., None])  # a token twice does not move a bound
        keys = jax.vmap(lambda x, i: x[i])(k, token)
        bounds = Bounds(jnp.min(keys, axis=2), jnp.max(keys, axis=2))
        found = jnp.sum(bound_scores(q, bounds), axis=2)  # [B, Hkv, T, tile]
        wanted = first[:, :, None] + jnp.arange(blocks, dtype=jnp.int32)[None, None] - tile * tile_size
        here = jnp.take_along_axis(found, jnp.clip(wanted, 0, tile_size - 1)[:, None], axis=3)
        return jnp.where(((wanted >= 0) & (wanted < tile_size))[:, None], here, scores)

    tiles = -(-(jnp.max(number) + 1) // tile_size)
    shape = (batch, k.shape[2], length, blocks)
    return jax.lax.fori_loop(jnp.zeros_like(tiles), tiles, add_tile, jnp.zeros(shape, jnp.float32))


def row_of_text(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The row of the first token of each token's text; padding counts as a text."""
    row = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(new, row, 0), axis=1)


def own_text(x: Float[Array, "B *heads C S"], first: Int[Array, "B C"], fill: float) -> Array:
    """What `x` says of tokens, told of the tokens of each query's text, which begins at row `first`."""
    token = first[..., None] + jnp.arange(x.shape[-1], dtype=jnp.int32)[None, None]
    token = token.reshape(token.shape[0], *[1] * (x.ndim - 3), *token.shape[1:])
    return jnp.take_along_axis(x, token, axis=-1, mode="fill", fill_value=fill)


def causal_scores(
    q: Float[Array, "B C Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    positions: Int[Array, " C"],
    scale: float,
    first: Int[Array, "B C"] | None = None,
) -> Float[Array, "B Hkv G C S"]:
    """Scaled scores of queries at `positions`, -inf after them and before the `first` token of their text.
    float32."""
    scores = jnp.einsum("bthgd,bshd->bhgts", q, k, preferred_element_type=jnp.float32) * scale
    index = jnp.arange(k.shape[1])[None]
    visible = (index <= positions[:, None])[None]
    if first is not None:
        visible = visible & (index[None] >= first[..., None])
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def block_mass(
    scores: Float[Array, "B Hkv G C S"], size: int, first: Int[Array, "B C"] | None = None
) -> Float[Array, "B Hkv G C N"]:
    """The attention, softmax of `scores`, that each block gets, counted from the `first` row of a query's
    text (None: 0)."""
    mass = jax.nn.softmax(scores, axis=-1)
    tokens_first = jnp.moveaxis(mass if first is None else own_text(mass, first, 0.0), -1, 1)
    return jnp.moveaxis(jnp.sum(in_blocks(tokens_first, size), axis=2), 1, -1)


def by_queries(
    function: Callable[..., Array],
    q: Float[Array, "B T Hkv G Dk"],
    *others: Float[Array, "B T ..."] | Int[Array, "B T ..."],
    keys: int | None = None,
) -> Float[Array, "B T ..."]:
    """`function(queries [B, C, ...], their positions [C], others [B, C, ...]) -> [B, C, ...]`, chunk by
    chunk, against `keys` tokens (None: as many as queries)."""
    batch, length, kv_heads, groups, _ = q.shape
    size = max(1, min(length, CHUNK_ELEMENTS // (batch * kv_heads * groups * (keys or length))))
    spare = -length % size

    def chunks(x: Array) -> Array:
        # What fills up the last chunk is cut off again.
        padded = jnp.pad(x, ((0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    positions = jnp.minimum(jnp.arange(length + spare, dtype=jnp.int32), length - 1).reshape(-1, size)
    of_chunks = (chunks(q), positions, *map(chunks, others))
    out = jnp.moveaxis(jax.lax.map(lambda chunk: function(*chunk), of_chunks), 0, 1)
    return out.reshape(batch, length + spare, *out.shape[3:])[:, :length]


class AuxiliarySelector(nnx.Module):
    """Queries of its own with the mean of its own keys over each block.

    Source: arXiv 2502.11089, section 6.1, which gives no sizes; one query for a GQA group, no positions.
    """

    def __init__(self, config: ModelConfig, init: Initializer):
        c = config
        shape, axes = (c.width, c.kv_heads, c.nsa.selector_dim), ("embed", "kv_heads", "head_dim")
        self.block_size = c.nsa.block_size
        self.query = init.normal(shape, axes, c.initializer_range)
        self.key = init.normal(shape, axes, c.initializer_range)

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B Hkv T N"]:
        """Scores of the blocks of each query's text, float32. No gradient reaches x."""
        x = jax.lax.stop_gradient(x)
        queries, keys = (jnp.einsum("btd,dhr->bthr", x, w.astype(x.dtype)) for w in (self.query, self.key))
        scale = queries.shape[-1] ** -0.5
        if segment_ids is None:
            means = jnp.mean(in_blocks(keys, self.block_size), axis=2)
            return jnp.einsum("bthr,bnhr->bhtn", queries, means, preferred_element_type=jnp.float32) * scale

        # Blocks begin anywhere: the mean of the scores of their tokens is the same.
        @jax.checkpoint
        def of_tokens(q: Array, _: Array, first: Array) -> Array:
            scores = jnp.einsum("bthgr,bshr->bhts", q, keys, preferred_element_type=jnp.float32) * scale
            scores = jnp.moveaxis(own_text(scores, first, 0.0), -1, 1)
            return jnp.moveaxis(jnp.mean(in_blocks(scores, self.block_size), axis=2), 3, 1)

        return jnp.moveaxis(by_queries(of_tokens, queries[:, :, :, None], row_of_text(segment_ids)), 3, 1)


def auxiliary_loss(
    scores: Float[Array, "B Hkv T N"],
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B T Hkv Dk"],
    nsa: NSAConfig,
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """KL divergence (nats) of softmax(scores) from the attention that blocks get, mean over heads of a group.

    Over the blocks that a query may choose freely, mean over the queries that have any; no gradient reaches q
    and k. Every query attends to everything here: the cost of dense attention, in training.
    """
    q, k = jax.lax.stop_gradient((q, k))
    row = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    texts = () if segment_ids is None else (row_of_text(segment_ids),)

    def mass(q: Array, at: Array, first: Array | None = None) -> Array:
        of_heads = block_mass(causal_scores(q, k, at, scale, first), nsa.block_size, first)
        return jnp.moveaxis(jnp.sum(of_heads, axis=2), 2, 1)

    attention = jnp.moveaxis(by_queries(mass, q, *texts), 2, 1)
    block = jnp.arange(scores.shape[-1])[None, None]
    own = ((row - texts[0] if texts else row) // nsa.block_size)[..., None]
    free = (block >= nsa.num_init) & (block <= own - nsa.num_local)
    if segment_ids is not None:
        free = free & (segment_ids != 0)[..., None]
    free = jnp.broadcast_to(free, (q.shape[0], *free.shape[1:]))[:, None]
    target = jnp.where(free, attention, 0)
    target = target / jnp.maximum(jnp.sum(target, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    log_found = jax.nn.log_softmax(jnp.where(free, scores, jnp.finfo(jnp.float32).min), axis=-1)
    log_target = jnp.log(jnp.where(target > 0, target, 1))
    divergence = jnp.sum(target * (log_target - jnp.where(free, log_found, 0)), axis=-1)
    queries = jnp.sum(jnp.any(free, axis=-1), dtype=jnp.float32)
    return jnp.sum(divergence) / (scores.shape[1] * jnp.maximum(queries, 1))


def in_blocks(
    x: Float[Array, "B S *rest"], size: int, **padding: float | str
) -> Float[Array, "B N size *rest"]:
    """Cut into blocks of tokens, the last one filled up as jnp.pad does: by default with zeros."""
    widths = [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, widths, **padding)  # type: ignore[arg-type]
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])
