"""Images to tokens: patches, a vision transformer on the decoder's own layers, and the projector."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.attention import Where
from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import norm
from jaxlab.models.modules import Params
from jaxlab.models.stack import stack


def encode_images(
    params: Params, images: Float[Array, "B n height width channels"], config: ModelConfig
) -> Float[Array, "B P D"]:
    """Image tokens in the decoder's width, each row's images in order; P = n_images * patches per image."""
    vision, v = params["vision"], config.vision
    batch, count = images.shape[:2]
    if images.shape[2:] != (v.image_size, v.image_size, v.channels):
        raise ValueError(
            f"images are {images.shape[2:]}, the model takes {v.image_size, v.image_size, v.channels}"
        )
    side, size = v.image_size // v.patch_size, v.patch_size
    x = images.reshape(batch * count, side, size, side, size, v.channels).swapaxes(2, 3)
    x = x.reshape(batch * count, side * side, size * size * v.channels).astype(config.compute_dtype)
    x = x @ vision["patch"]["table"].astype(x.dtype) + vision["patch"]["bias"].astype(x.dtype)[None, None]
    x = x + vision["position"]["table"].astype(x.dtype)[None]
    where = Where(jnp.zeros(x.shape[:2], jnp.int32))
    x = stack(vision["layers"], x, where, config.tower, causal=False).x
    x = norm(vision["final_norm"], x, config.tower)
    p = jax.tree.map(lambda w: w.astype(x.dtype), params["projector"])
    x = jax.nn.gelu(x @ p["hidden"] + p["hidden_bias"][None, None], approximate=False)
    x = x @ p["output"] + p["output_bias"][None, None]
    return x.reshape(batch, count * side * side, config.width)


def place_images(
    x: Float[Array, "B T D"], tokens: Int[Array, "B T"], patches: Float[Array, "B P D"], image_token: int
) -> Float[Array, "B T D"]:
    """The k-th placeholder of a row becomes its k-th image token; those beyond P keep their embedding."""
    is_image = tokens == image_token
    index = jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1
    taken = jnp.take_along_axis(patches, jnp.clip(index, 0, patches.shape[1] - 1)[:, :, None], axis=1)
    return jnp.where((is_image & (index < patches.shape[1]))[:, :, None], taken, x)
