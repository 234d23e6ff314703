"""Image tokens in the places that the text keeps for them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
