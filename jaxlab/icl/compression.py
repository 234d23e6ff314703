"""Anchor-only context compression: of the demonstrations, the cache keeps label words and format alone.

Source: Wang et al. 2023 (arXiv 2305.14160), section 3.2, tables 2 and 3. The demonstrations are read once;
of every layer's keys and values those of chosen tokens stay; the query goes on from them at the positions
that it has in the full prompt.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import UserError
from jaxlab.models import Batch, Cache, ModelConfig, Params, forward, init_cache


class Split(NamedTuple):
    """Prompts cut into their demonstrations and their query, both padded at the right."""

    context: Int[np.ndarray, "B D"]
    context_lengths: Int[np.ndarray, " B"]
    query: Int[np.ndarray, "B Q"]
    last: Int[np.ndarray, " B"]
    """Where in `query` the answer is read off."""

    @property
    def shared(self) -> bool:
        """Whether all prompts have the same demonstrations, which then are read once for all."""
        same = bool((self.context_lengths == self.context_lengths[0]).all())
        return same and bool((self.context == self.context[0]).all())


def check_compression(config: ModelConfig, longest: int) -> None:
    """Refuse caches that are not keys and values of every token.

    Args:
      longest: tokens of the longest prompt.

    Raises:
      UserError: native sparse or sparse attention, a sliding window shorter than the prompts, or layers that
        read images.
    """
    if "nsa" in config.kinds or config.sparsity is not None:
        raise UserError(
            "compression keeps keys and values of chosen tokens; sparse attention has other caches"
        )
    if "sliding" in config.kinds and config.sliding.window < longest:
        raise UserError(
            f"compression: prompts of {longest} tokens are longer than the model's window of "
            f"{config.sliding.window}, which counts the tokens that are kept"
        )


def split_prompts(
    tokens: Int[np.ndarray, "B T"], starts: Int[np.ndarray, " B"], positions: Int[np.ndarray, " B"]
) -> Split:
    """Prompts cut where their queries start, padded to few different lengths, so that few programs are
    compiled.

    Args:
      positions: the last token of each.
    """
    width = -(-int(starts.max()) // 16) * 16
    room = -(-int((positions - starts + 1).max()) // 8) * 8
    context, query = (np.zeros((len(tokens), size), np.int32) for size in (width, room))
    for row, (start, last) in enumerate(zip(starts.tolist(), positions.tolist(), strict=True)):
        context[row, :start] = tokens[row, :start]
        query[row, : last + 1 - start] = tokens[row, start : last + 1]
    return Split(context, starts.astype(np.int32), query, (positions - starts).astype(np.int32))


def chosen_places(keep: Bool[np.ndarray, "*E B D"], width: int | None = None) -> Int[np.ndarray, "*E B P"]:
    """The tokens to be kept, in their order, -1 behind them; P: the most of a row, up to the next multiple of
    8, or `width`."""
    counts = keep.sum(-1)
    size = max(8, -(-int(counts.max(initial=0)) // 8) * 8) if width is None else width
    order = np.argsort(~keep, axis=-1, kind="stable")[..., :size]
    pad = [(0, 0)] * (order.ndim - 1) + [(0, size - order.shape[-1])]
    return np.where(np.arange(size) < counts[..., None], np.pad(order, pad), -1).astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
def read_context(
    params: Params,
    tokens: Int[Array | np.ndarray, "B D"],
    lengths: Int[Array | np.ndarray, " B"],
    config: ModelConfig,
) -> Cache:
    """The cache of the demonstrations; tokens past `lengths` are padding."""
    return read_on(params, init_cache(config, *tokens.shape), tokens, lengths, config)


@functools.partial(jax.jit, static_argnames=("room", "offset"))
def keep_tokens(cache: Cache, at: Int[Array, "B P"], room: int, offset: bool = True) -> Cache:
    """The cache with the keys and values of some tokens alone, and room for so many more.

    Args:
      cache: of B rows, or of one, which then stands for all.
      at: which tokens, in their order, -1 behind them.
      offset: whether what follows keeps the positions that it has behind all tokens; else its positions
        follow on the number of tokens kept.
    """
    at = jnp.asarray(at)
    rows = at.shape[0]
    count = jnp.sum(at >= 0, axis=1, dtype=jnp.int32)

    def gather(x: Array) -> Array:
        x = jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:]))
        kept = jnp.take_along_axis(x, jnp.maximum(at, 0)[None, :, :, None, None], axis=2)
        return jnp.pad(kept, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))

    moved = cache.length + cache.offset - count if offset else jnp.zeros_like(count)
    keys, values = cast(tuple[Array, Array], cache.layers)
    return Cache((gather(keys), gather(values)), count, jnp.broadcast_to(moved, count.shape))


class SharedContext(NamedTuple):
    """The demonstrations that prompts have in common, read, and what is left of each prompt."""

    cache: Cache
    """With room for the queries, a row for each."""
    query: Int[np.ndarray, "B Q"]
    last: Int[np.ndarray, " B"]


def read_shared(
    params: Params,
    tokens: Int[np.ndarray, "B T"],
    starts: Int[np.ndarray, " B"],
    positions: Int[np.ndarray, " B"],
    config: ModelConfig,
) -> SharedContext | None:
    """Demonstrations read once for all prompts; None where they are not the same, or the model's cache holds
    no keys and values of every token.

    Args:
      starts: where the query of each begins.
      positions: the last token of each.
    """
    if "nsa" in config.kinds or config.sparsity is not None or not starts.any():
        return None
    split = split_prompts(tokens, starts, positions)
    if not split.shared:
        return None
    cache = read_context(params, split.context[:1], split.context_lengths[:1], config)
    everything = np.arange(split.context.shape[1]) < split.context_lengths[:, None]
    places = chosen_places(everything, split.context.shape[1])
    return SharedContext(keep_tokens(cache, places, split.query.shape[1]), split.query, split.last)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read_on(
    params: Params,
    cache: Cache,
    tokens: Int[Array | np.ndarray, "B Q"],
    count: Int[Array | np.ndarray, " B"],
    config: ModelConfig,
) -> Cache:
    """The cache with the first `count` of some tokens behind what it holds."""
    there = jnp.arange(tokens.shape[1])[None] < jnp.asarray(count)[:, None]
    batch: Batch = {"tokens": jnp.asarray(tokens), "segment_ids": there.astype(jnp.int32)}
    one = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    found = forward(params, batch, config, cache=cache, logit_positions=one).cache
    assert found is not None
    return found


@functools.partial(jax.jit, static_argnames="config")
def continued_logits(
    params: Params,
    cache: Cache,
    query: Int[Array | np.ndarray, "B Q"],
    last: Int[Array | np.ndarray, " B"],
    config: ModelConfig,
) -> Float[Array, "B V"]:
    """Logits at `last` of the query, which goes on from the cache."""
    batch: Batch = {"tokens": jnp.asarray(query)}
    at = jnp.asarray(last)[:, None]
    return forward(params, batch, config, cache=cache, logit_positions=at).logits[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "offset"))
def compressed_logits(
    params: Params,
    cache: Cache,
    at: Int[Array | np.ndarray, "E B P"],
    query: Int[Array | np.ndarray, "B Q"],
    last: Int[Array | np.ndarray, " B"],
    config: ModelConfig,
    offset: bool = True,
) -> Float[Array, "E B V"]:
    """Logits at `last` of the query after each of E choices of tokens to keep; one program serves all."""

    def one(chosen: Array) -> Array:
        kept = keep_tokens(cache, chosen, query.shape[1], offset)
        return continued_logits(params, kept, query, last, config)

    return jax.lax.map(one, jnp.asarray(at))


@functools.partial(jax.jit, static_argnames="config")
def last_logits(
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, " B"],
    config: ModelConfig,
) -> Float[Array, "B V"]:
    """Logits at `positions` of prompts that are read whole."""
    at = jnp.asarray(positions)[:, None]
    return forward(params, {"tokens": tokens}, config, logit_positions=at).logits[:, 0]


def anchor_text(
    tokens: Int[np.ndarray, "B T"], keep: Bool[np.ndarray, "B T"], positions: Int[np.ndarray, " B"]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Text_anchor: prompts without the tokens that are not kept, and where they end now."""
    order = np.argsort(~keep, axis=1, kind="stable")
    short = np.take_along_axis(tokens, order, axis=1)
    short = np.where(np.arange(tokens.shape[1]) < keep.sum(1, keepdims=True), short, 0)
    ends = np.take_along_axis(np.cumsum(keep, axis=1), positions[:, None], axis=1)[:, 0] - 1
    return short.astype(np.int32), ends.astype(np.int32)


def random_instead(
    rng: np.random.Generator,
    anchors: Bool[np.ndarray, "B D"],
    others: Bool[np.ndarray, "B D"],
    spans: Int[np.ndarray, "B D"] | None = None,
) -> Bool[np.ndarray, "B D"]:
    """As many of the `others` as there are anchors in each row (all of them, if they are fewer).

    Args:
      spans: which demonstration a token is of: then one is drawn for each anchor from its own one (the
        released code).
    """
    draw = np.where(others, rng.random(others.shape), 2.0)
    if spans is None:
        rank = np.argsort(np.argsort(draw, axis=1), axis=1)
        return (rank < anchors.sum(1, keepdims=True)) & others
    chosen = np.zeros_like(others)
    for row in range(len(draw)):
        for span in np.unique(spans[row][anchors[row]]).tolist():
            mine = spans[row] == span
            wanted = int((anchors[row] & mine).sum())
            order = np.argsort(np.where(mine, draw[row], 2.0))[:wanted]
            chosen[row, order] = others[row, order] & mine[order]
    return chosen
