"""The forward pass: one pure function for every language model and vision-language model."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.attention import Cache
from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import norm, softcap
from jaxlab.models.mesh import split_tokens
from jaxlab.models.modules import Params
from jaxlab.models.probe import Probe
from jaxlab.models.rotary import tables
from jaxlab.models.stack import stack
from jaxlab.models.vision import encode_images, place_images, prepare_batch, scatter_deep
from jaxlab.models.where import Where

Batch = dict[str, Any]
"""tokens int32[B, T]; where they apply segment_ids int32[B, T] (0 = padding), positions int32[B, T] or with
M-RoPE int32[B, T, 3] (with a cache they count on from what it holds), together int32[B, T] (tokens of one
number above 0 see each other), images float32[B, n_images, height, width, channels]."""


def forward(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    probe: Probe | None = None,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
    """Next-token logits of a batch.

    With a `cache`, the tokens continue what it holds (segment_ids then mark padding at the right end only),
    and the intermediates carry the cache with them in it. With a `probe`, attention is tapped or edited (see
    probe.py).

    Returns:
      float32 logits and the named intermediates: "hidden" [B, T, D] after the last norm, "cache" where one
      was given, "chosen_blocks" int32[L, B, Hkv, T, n] with NSA, "selector_loss" float32[L] with its
      auxiliary selector, "balance_loss" float32[layers] with experts.
      Unused ones cost nothing under jit.

    Raises:
      ValueError: images for a model without vision, a probe together with a cache, or positions that are
        given together with a cache of NSA, which counts its blocks itself.
    """
    if "images" in batch and not config.has_vision:
        raise ValueError("the batch holds images, the model has no vision")
    if probe is not None and cache is not None:
        raise ValueError("a probe reads whole sequences; it cannot be used with a cache")
    if cache is not None and config.attention == "nsa" and "positions" in batch:
        raise ValueError("NSA's cache counts positions itself; leave them out of the batch")
    batch = {name: jnp.asarray(value) for name, value in prepare_batch(batch, config).items()}
    x, where, additions = embed(params, batch, config, cache)
    layers = stack(
        params["layers"],
        x,
        where,
        config,
        dense_params=params.get("dense_layers"),
        probe=probe,
        cache=cache,
        additions=additions,
    )

    x = norm(params["final_norm"], split_tokens(layers.x), config)
    head = params["embedding"]["table"].T if config.tie_embeddings else params["head"]["table"]
    logits = jnp.einsum("btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    if config.head_bias:
        logits = logits + params["head"]["bias"].astype(jnp.float32)[None, None]
    logits = softcap(logits, config.logit_softcap)
    intermediates: dict[str, Any] = {"hidden": x}
    if layers.choice.blocks is not None:
        intermediates["chosen_blocks"] = layers.choice.blocks
    if layers.choice.loss is not None:
        intermediates["selector_loss"] = layers.choice.loss
    if layers.balance is not None:
        intermediates["balance_loss"] = layers.balance
    if cache is not None and layers.caches is not None:
        length = cache.length + _lengths(batch)
        offset = _next_position(batch, where, cache) - length if "positions" in batch else cache.offset
        intermediates["cache"] = Cache(layers.caches, length, offset)
    return logits, intermediates


def embed(
    params: Params, batch: Batch, config: ModelConfig, cache: Cache | None = None
) -> tuple[Float[Array, "B T D"], Where, Float[Array, "n B T D"] | None]:
    """What the first layer reads of a prepared batch, where its tokens stand, and what is added to the
    outputs of the first n layers (DeepStack)."""
    tokens = batch["tokens"]
    where = _where(batch, config, cache)
    x = params["embedding"]["table"].astype(config.compute_dtype)[tokens]
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    additions = None
    if "images" in batch:
        images = encode_images(params, batch, config)
        x = place_images(x, tokens, images.tokens, config.vision.image_token)
        if images.deep is not None:
            additions = scatter_deep(images.deep, tokens, config.vision.image_token)
    if config.position == "learned":
        x = x + params["position"]["table"].astype(x.dtype)[where.positions]
    return x, where, additions


def _where(batch: Batch, config: ModelConfig, cache: Cache | None) -> Where:
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    rows = None
    if cache is not None:
        rows = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if "positions" in batch:
        positions = batch["positions"]
        if cache is not None:
            start = cache.length + cache.offset
            positions = positions + start.reshape(-1, *[1] * (positions.ndim - 1))
    elif cache is not None and rows is not None:
        positions = rows + cache.offset[:, None]
    else:
        positions = positions_of(tokens, segment_ids)
    rotary, local_rotary = tables(positions, config)
    return Where(
        positions,
        segment_ids,
        rows,
        batch.get("together"),
        rotary=rotary,
        local_rotary=local_rotary,
        together_in_window=config.vision.vit.together == "images",
    )


def _next_position(batch: Batch, where: Where, cache: Cache) -> Int[Array, " B"]:
    """One more than the last position of each row's tokens, whatever coordinate it is of; a row that adds no
    token to the cache stays where it was."""
    positions = where.positions
    if positions.ndim == 3:
        positions = jnp.max(positions, axis=-1)
    if "segment_ids" in batch:
        positions = jnp.where(batch["segment_ids"] != 0, positions, -1)
    return jnp.maximum(jnp.max(positions, axis=1) + 1, cache.length + cache.offset)


def _lengths(batch: Batch) -> Int[Array, " B"]:
    tokens = batch["tokens"]
    if "segment_ids" not in batch:
        return jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    return jnp.sum(batch["segment_ids"] != 0, axis=1, dtype=jnp.int32)


def positions_of(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Position of each token in its own segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if segment_ids is None:
        return index
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.concatenate([jnp.zeros_like(index[:, :1]), jnp.where(changed, index[:, 1:], 0)], axis=1)
    return index - jax.lax.cummax(starts, axis=1)
