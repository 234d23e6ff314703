"""Images to tokens: the kinds of vision towers, and where their tokens go in the text."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig
from jaxlab.models.modules import Params
from jaxlab.models.vision.tower import Encoded, Tower

__all__ = ["Encoded", "Tower", "encode_images", "place_images", "prepare_batch", "tower_of"]


def tower_of(config: ModelConfig) -> Tower:
    """The kind of tower of a model with vision: `TOWER` of the module of that name."""
    tower: Tower = importlib.import_module(f"{__name__}.{config.vision.kind}").TOWER
    return tower


def prepare_batch(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The batch with what follows from the sizes of its images, worked out on the host.

    `forward` does it by itself; where it is jitted and images vary in size, call this before, outside of jit.
    A batch that is prepared, or needs nothing, stays as it is.

    Raises:
      ValueError: sizes of images are traced, or do not fit the placeholders in the text.
    """
    if "images" not in batch or not config.has_vision:
        return dict(batch)
    return {**batch, **tower_of(config).prepare(batch, config)}


def encode_images(params: Params, batch: Mapping[str, Any], config: ModelConfig) -> Encoded:
    """The image tokens of a prepared batch."""
    return tower_of(config).encode(params, batch, config)


def place_images(
    x: Float[Array, "B T D"], tokens: Int[Array, "B T"], images: Float[Array, "*rows P D"], image_token: int
) -> Float[Array, "B T D"]:
    """`x` with the k-th placeholder of a row replaced by the row's k-th image token.

    Where the rows share one list of image tokens [P, D], placeholders are counted over the whole batch.
    Placeholders beyond P stay as they are.
    """
    is_image = tokens == image_token
    if images.ndim == 2:
        index = (jnp.cumsum(is_image.reshape(-1), dtype=jnp.int32) - 1).reshape(tokens.shape)
        taken = images[jnp.clip(index, 0, images.shape[0] - 1)]
    else:
        index = jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1
        clipped = jnp.clip(index, 0, images.shape[-2] - 1)[:, :, None]
        taken = jnp.take_along_axis(images, clipped, axis=1)
    return jnp.where((is_image & (index < images.shape[-2]))[:, :, None], taken.astype(x.dtype), x)


def scatter_deep(
    deep: Float[Array, "n P D"], tokens: Int[Array, "B T"], image_token: int
) -> Float[Array, "n B T D"]:
    """DeepStack's additions at the placeholders, zero elsewhere."""
    zero = jnp.zeros((*tokens.shape, deep.shape[-1]), deep.dtype)
    return jax.vmap(lambda layer: place_images(zero, tokens, layer, image_token))(deep)
