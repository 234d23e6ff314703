"""The kinds of vision encoders, and the images of a batch as tokens."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models.batch import Batch, Params, check_positions, check_tokens
from jaxlab.models.config import ModelConfig
from jaxlab.models.initializer import bind
from jaxlab.models.kv_cache import Cache
from jaxlab.models.stack import NO_BETWEEN, Between
from jaxlab.models.vision.encoder import Encoded, Encoder
from jaxlab.models.vision.mllama import MllamaEncoder
from jaxlab.models.vision.plain import PlainEncoder
from jaxlab.models.vision.qwen import QwenEncoder
from jaxlab.models.vision.vit import ViTEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "plain": PlainEncoder,
    "vit": ViTEncoder,
    "qwen": QwenEncoder,
    "mllama": MllamaEncoder,
}
"""By `VisionConfig.kind`."""


def encoder_of(config: ModelConfig) -> type[Encoder]:
    """The vision encoder of a model with vision."""
    if config.vision is None:
        raise ValueError("a model without vision encodes no images")
    return ENCODERS[config.vision.kind]


def prepare_batch(batch: Mapping[str, Any], config: ModelConfig) -> Batch:
    """The batch with what follows from the sizes of its images, worked out on the host.

    `forward` does it by itself; where it is jitted and images vary in size, call this before, outside of jit.
    A batch that is prepared, or needs nothing, stays as it is. An attention_mask [B, T] of tokenizers becomes
    segment_ids, or goes where it hides nothing. Tokens that are not traced are checked.

    Raises:
      ValueError: sizes of images are traced, or do not fit the placeholders in the text; the embedding has no
        row for a token, or the table of learned positions none for its place; or an attention_mask of
        another shape, or beside segment_ids.
    """
    check_tokens(batch["tokens"], config)
    if "attention_mask" in batch:
        batch = _with_segments(batch)
    check_positions(batch, config)
    if "images" not in batch or not config.has_vision:
        return cast(Batch, dict(batch))
    return cast(Batch, {**batch, **encoder_of(config).prepare(batch, config)})


def _with_segments(batch: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in batch.items() if name != "attention_mask"}
    mask, shape = batch["attention_mask"], np.shape(batch["tokens"])
    if np.shape(mask) != shape:
        raise ValueError(
            f"attention_mask is {np.shape(mask)}, tokens are {shape}; who sees whom is not its own"
        )
    if "segment_ids" in batch:
        raise ValueError("attention_mask and segment_ids both say what is padding; give one")
    if not isinstance(mask, jax.core.Tracer | jax.ShapeDtypeStruct):
        mask = np.asarray(mask)
        if np.all(mask):
            return rest
    return rest | {"segment_ids": (jnp.asarray(mask) != 0).astype(jnp.int32)}


def encode_images(
    params: Params, batch: Mapping[str, Any], config: ModelConfig, cache: Cache | None = None
) -> Encoded | None:
    """The images of a prepared batch, or those that layers read and the cache keeps; None: there are none.

    Raises:
      ValueError: images that the model does not take, images after others that the cache keeps, or
        parameters that are not those of the config.
    """
    kept = None if cache is None else cache.cross
    if "images" not in batch and kept is None:
        return None
    if "images" in batch and kept is not None:
        raise ValueError("images cannot follow others that were read before; read them in one batch")
    if kept is not None:
        return Encoded(cross=kept)
    return _encoder(params, config)(batch)


def layers_between(params: Params, images: Encoded | None, config: ModelConfig) -> Between:
    """The layers that stand between those of the decoder and read the images; none of most models."""
    if images is None or images.cross is None:
        return NO_BETWEEN
    return _encoder(params, config).between(images.cross)


def _encoder(params: Params, config: ModelConfig) -> Encoder:
    own: Params = {name: params[name] for name in ("vision", "projector") if name in params}
    return bind(own, encoder_of(config), config)
