"""The forward pass: one pure function for every language model and vision-language model."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.attention import Cache, Where
from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import norm
from jaxlab.models.modules import Params
from jaxlab.models.probe import Probe
from jaxlab.models.stack import stack
from jaxlab.models.vision import encode_images, place_images

Batch = dict[str, Any]
"""tokens int32[B, T]; where they apply segment_ids int32[B, T] (0 = padding), positions int32[B, T],
images float32[B, n_images, height, width, channels]."""


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
      was given, "chosen_blocks" int32[L, B, Hkv, T, n] with NSA. Unused ones cost nothing under jit.

    Raises:
      ValueError: images for a model without vision, or a probe together with a cache.
    """
    if "images" in batch and not config.has_vision:
        raise ValueError("the batch holds images, the model has no vision")
    if probe is not None and cache is not None:
        raise ValueError("a probe reads whole sequences; it cannot be used with a cache")
    tokens = batch["tokens"]
    where = _where(batch, cache)
    x = params["embedding"]["table"].astype(config.compute_dtype)[tokens]
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if "images" in batch:
        patches = encode_images(params, batch["images"], config)
        x = place_images(x, tokens, patches, config.vision.image_token)
    if config.position == "learned":
        x = x + params["position"]["table"].astype(x.dtype)[where.positions]
    x, caches, chosen = stack(params["layers"], x, where, config, probe=probe, cache=cache)

    x = norm(params["final_norm"], x, config)
    head = params["embedding"]["table"].T if config.tie_embeddings else params["head"]["table"]
    logits = jnp.einsum("btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    intermediates: dict[str, Any] = {"hidden": x}
    if chosen is not None:
        intermediates["chosen_blocks"] = chosen
    if cache is not None and caches is not None:
        intermediates["cache"] = Cache(*caches, cache.length + _lengths(batch))
    return logits, intermediates


def _where(batch: Batch, cache: Cache | None) -> Where:
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    if cache is not None:
        rows = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return Where(rows, segment_ids, rows)
    if "positions" in batch:
        return Where(batch["positions"], segment_ids)
    return Where(positions_of(tokens, segment_ids), segment_ids)


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
