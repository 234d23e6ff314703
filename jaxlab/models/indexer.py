"""An indexer: small heads of its own that rate tokens, so that blocks are chosen before attention reads them.

A block is worth its best visible token, and the scores of tokens learn the attention that tokens get, as in
MiniMax Sparse Attention (arXiv 2606.13392, sec. 3.1 and 3.2). Scores of queries and tokens exist for a chunk
of queries at a time, forward and backward. Axis letters: I index heads of a GQA group, R their dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.models.config import ModelConfig
from jaxlab.models.initializer import Initializer
from jaxlab.models.rotary import Rotary, rotate
from jaxlab.models.selectors import by_queries, own_text, row_of_text


class IndexQueries(NamedTuple):
    """What rates tokens for each query and GQA group."""

    heads: Float[Array, "B T Hkv I R"]
    weights: Float[Array, "B T Hkv I"] | None
    """Of the heads' scores above 0; None: one head, whose product is the score."""


class Indexer(nnx.Module):
    """Queries for each GQA group, one key for all of them, rotary positions where the model has them.

    No gradient reaches the layer's input. Source: arXiv 2606.13392, sec. 3.1 (`selector_score: dot`); heads
    whose scores above 0 are weighted by the query: DeepSeek-V3.2's lightning indexer (`relu`).
    """

    def __init__(self, config: ModelConfig, init: Initializer):
        c, n, std = config, config.nsa, config.initializer_range
        heads = c.kv_heads * n.selector_heads
        self.kv_heads, self.interleaved = c.kv_heads, c.position.kind == "rotary" and c.position.interleaved
        self.query = init.normal((c.width, heads, n.selector_dim), ("embed", "kv_heads", "head_dim"), std)
        self.key = init.normal((c.width, n.selector_dim), ("embed", "head_dim"), std)
        weighted = n.selector_score == "relu"
        self.weight = init.normal((c.width, heads), ("embed", "kv_heads"), std) if weighted else None

    def queries(self, x: Float[Array, "B T D"], rotary: Rotary | None) -> IndexQueries:
        x = jax.lax.stop_gradient(x)
        grouped = lambda y: y.reshape(*y.shape[:2], self.kv_heads, -1, *y.shape[3:])
        heads = self._turned(jnp.einsum("btd,dhr->bthr", x, self.query.astype(x.dtype)), rotary)
        if self.weight is None:
            return IndexQueries(grouped(heads), None)
        return IndexQueries(grouped(heads), grouped(x @ self.weight.astype(x.dtype)))

    def keys(self, x: Float[Array, "B T D"], rotary: Rotary | None) -> Float[Array, "B T 1 R"]:
        x = jax.lax.stop_gradient(x)
        return self._turned((x @ self.key.astype(x.dtype))[:, :, None], rotary)

    def _turned(self, x: Float[Array, "B T H R"], rotary: Rotary | None) -> Float[Array, "B T H R"]:
        """As the attention's heads are turned, by as many of their wavelengths as it has dimensions for."""
        if rotary is None:
            return x
        theirs = rotary.cos.shape[-1]
        pairs = min(theirs, x.shape[-1] // 2)
        spread = np.arange(pairs) * theirs // max(pairs, 1)
        return rotate(x, Rotary(rotary.cos[..., spread], rotary.sin[..., spread]), self.interleaved)


def token_scores(queries: IndexQueries, keys: Float[Array, "B S 1 R"]) -> Float[Array, "B Hkv T S"]:
    """What tokens score, float32: q . k / sqrt(R), or the heads' parts above 0 of that, weighted, summed over
    the I heads and divided by sqrt(I)."""
    heads, weights = queries
    scale = keys.shape[-1] ** -0.5
    products = (
        jnp.einsum("bthir,bsr->bhits", heads, keys[:, :, 0], preferred_element_type=jnp.float32) * scale
    )
    if weights is None:
        return products[:, :, 0]
    weights = jnp.moveaxis(weights, 1, 3).astype(jnp.float32) * heads.shape[3] ** -0.5
    return jnp.sum(jax.nn.relu(products) * weights[..., None], axis=2)


def block_scores(
    queries: IndexQueries,
    keys: Float[Array, "B S 1 R"],
    rows: Int[Array, "B T"],
    size: int,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B Hkv T N"]:
    """The best score of a visible token in each block of a query's text; -inf where none is visible.

    `rows` are the queries' places among the keys. No gradient flows through it.
    """
    queries, keys = jax.lax.stop_gradient((queries, keys))
    first = jnp.zeros_like(rows) if segment_ids is None else _at(row_of_text(segment_ids), rows)
    weighted = queries.weights is not None

    def best(heads: Array, _: Array, rows: Array, first: Array, *weights: Array) -> Array:
        scores = token_scores(IndexQueries(heads, *weights or (None,)), keys)
        scores = jnp.where(_seen(rows, first, keys.shape[1])[:, None], scores, -jnp.inf)
        if segment_ids is not None:
            scores = own_text(scores, first, -jnp.inf)
        spare = [(0, 0)] * 3 + [(0, -scores.shape[-1] % size)]
        blocks = jnp.pad(scores, spare, constant_values=-jnp.inf).reshape(*scores.shape[:3], -1, size)
        return jnp.moveaxis(jnp.max(blocks, axis=-1), 2, 1)

    weights = (queries.weights,) if weighted else ()
    return jnp.moveaxis(by_queries(best, queries.heads, rows, first, *weights, keys=keys.shape[1]), 1, 2)


def indexer_loss(
    queries: IndexQueries,
    keys: Float[Array, "B T 1 R"],
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B T Hkv Dk"],
    chosen: Int[Array, "B Hkv T n"] | None,
    *,
    size: int,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """KL divergence (nats) of softmax(token scores) from the attention of q to k that tokens get, mean over
    the heads of a group: over the tokens of the `chosen` blocks, or over all visible ones (None: warm-up).

    Mean over groups and queries that are no padding; no gradient reaches q and k. Every query attends to
    everything here, masked: the cost of dense attention, in training.

    Source: arXiv 2606.13392, sec. 3.2.
    """
    q, k = jax.lax.stop_gradient((q, k))
    batch, length, kv_heads = q.shape[:3]
    rows = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    first = jnp.zeros_like(rows) if segment_ids is None else row_of_text(segment_ids)
    optional = {"weights": queries.weights}
    optional["chosen"] = None if chosen is None else jnp.moveaxis(chosen, 2, 1)
    names = [name for name, x in optional.items() if x is not None]

    @jax.checkpoint  # or the scores of all chunks would be kept for the backward pass
    def divergence(q: Array, _: Array, heads: Array, rows: Array, first: Array, *others: Array) -> Array:
        more = dict(zip(names, others, strict=True))
        support = _seen(rows, first, length)[:, None]
        if "chosen" in more:
            support &= _listed(
                jnp.moveaxis(more["chosen"], 1, 2), first, length, size, segment_ids is not None
            )
        lowest = jnp.finfo(jnp.float32).min
        attention = jnp.einsum("bthgd,bshd->bhgts", q, k, preferred_element_type=jnp.float32) * scale
        attention = jax.nn.softmax(jnp.where(support[:, :, None], attention, lowest), axis=-1)
        target = jnp.where(support, jnp.mean(attention, axis=2), 0)
        found = token_scores(IndexQueries(heads, more.get("weights")), keys)
        found = jax.nn.log_softmax(jnp.where(support, found, lowest), axis=-1)
        log_target = jnp.log(jnp.where(target > 0, target, 1))
        return jnp.moveaxis(jnp.sum(target * (log_target - jnp.where(support, found, 0)), axis=-1), 2, 1)

    others = [x for x in optional.values() if x is not None]
    of_queries = by_queries(divergence, q, queries.heads, rows, first, *others)
    if segment_ids is None:
        return jnp.mean(of_queries)
    real = (segment_ids != 0)[:, :, None]
    return jnp.sum(of_queries, where=real) / (kv_heads * jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1))


def _seen(rows: Int[Array, "B T"], first: Int[Array, "B T"], keys: int) -> Bool[Array, "B T S"]:
    """The tokens of a query's text up to its own."""
    index = jnp.arange(keys, dtype=jnp.int32)[None, None]
    return (index >= first[..., None]) & (index <= rows[..., None])


def _listed(
    chosen: Int[Array, "B Hkv C n"], first: Int[Array, "B C"], keys: int, size: int, packed: bool
) -> Bool[Array, "B Hkv C S"]:
    """Whether a token is in a chosen block of the query's text."""
    blocks = jnp.arange(-(-keys // size), dtype=jnp.int32)[None, None, None, None]
    listed = jnp.repeat(jnp.any(chosen[..., None] == blocks, axis=-2), size, axis=-1)[..., :keys]
    if not packed:
        return listed
    token = jnp.arange(keys, dtype=jnp.int32)[None, None] - first[..., None]
    return jnp.take_along_axis(listed, jnp.maximum(token, 0)[:, None], axis=3)


def _at(x: Int[Array, "B S"], rows: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.take_along_axis(x, rows, axis=1)
