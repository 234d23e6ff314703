"""The tower of our own models: square patches, a transformer of the decoder's layers, a two-layer MLP."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import norm
from jaxlab.models.modules import Layer, Norm, Numbers, Params, normal, zeros
from jaxlab.models.stack import stack
from jaxlab.models.vision.tower import Encoded, Tower
from jaxlab.models.where import Where


class VisionEdges(nnx.Module):
    """What stands around the layers of the vision transformer."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        v, std = config.vision, config.initializer_range
        pixels = v.patch_size**2 * v.channels
        self.patch = nnx.Dict(
            table=normal(numbers, (pixels, v.width), ("pixels", "embed"), pixels**-0.5),
            bias=zeros((v.width,), ("embed",)),
        )
        self.position = nnx.Dict(table=normal(numbers, (v.num_patches, v.width), ("position", "embed"), std))
        self.final_norm = Norm(config.tower)


class Projector(nnx.Module):
    """Two-layer GELU MLP from the vision width to the decoder's (as in LLaVA-1.5)."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        v, d = config.vision.width, config.width
        self.hidden = normal(numbers, (v, d), ("embed", "mlp"), v**-0.5)
        self.hidden_bias = zeros((d,), ("mlp",))
        self.output = normal(numbers, (d, d), ("mlp", "embed"), d**-0.5)
        self.output_bias = zeros((d,), ("embed",))


def layer(config: ModelConfig, numbers: Numbers) -> nnx.Module:
    return Layer(config.tower, numbers)


def encode(params: Params, batch: Mapping[str, Any], config: ModelConfig) -> Encoded:
    """Image tokens of batch["images"], float32[B, n, height, width, channels]: n * patches for each row."""
    vision, v, images = params["vision"], config.vision, batch["images"]
    rows, count = images.shape[:2]
    if images.shape[2:] != (v.image_size, v.image_size, v.channels):
        raise ValueError(
            f"images are {images.shape[2:]}, the model takes {v.image_size, v.image_size, v.channels}"
        )
    side, size = v.image_size // v.patch_size, v.patch_size
    x = images.reshape(rows * count, side, size, side, size, v.channels).swapaxes(2, 3)
    x = x.reshape(rows * count, side * side, size * size * v.channels).astype(config.compute_dtype)
    x = x @ vision["patch"]["table"].astype(x.dtype) + vision["patch"]["bias"].astype(x.dtype)[None, None]
    x = x + vision["position"]["table"].astype(x.dtype)[None]
    where = Where(jnp.zeros(x.shape[:2], jnp.int32))
    x = stack(vision["layers"], x, where, config.tower, causal=False).x
    x = norm(vision["final_norm"], x, config.tower)
    p = jax.tree.map(lambda w: w.astype(x.dtype), params["projector"])
    x = jax.nn.gelu(x @ p["hidden"] + p["hidden_bias"][None, None], approximate=False)
    x = x @ p["output"] + p["output_bias"][None, None]
    return Encoded(x.reshape(rows, count * side * side, config.width))


TOWER = Tower(edges=VisionEdges, layer=layer, projector=Projector, encode=encode)
