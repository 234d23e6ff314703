"""The encoder of our own models: square patches, a transformer of the decoder's blocks, a two-layer MLP."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.block import Block
from jaxlab.models.config import ModelConfig, NoPositions, PlainVisionConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.initializer import Initializer
from jaxlab.models.layers import Embedding, layer_norm, linear
from jaxlab.models.stack import apply_blocks
from jaxlab.models.vision.encoder import Encoded, Encoder
from jaxlab.models.vision.patches import PatchEmbedding, cut_patches


def tower_config(config: ModelConfig) -> ModelConfig:
    """The vision transformer in the decoder's terms: a pre-norm ViT with LayerNorm, GELU and biases."""
    v = config.vision_as(PlainVisionConfig)
    return ModelConfig(
        vocab_size=1,
        width=v.width,
        num_layers=v.num_layers,
        num_heads=v.num_heads,
        mlp="plain",
        mlp_width=v.mlp_width,
        activation="gelu",
        norm="layer",
        norm_eps=1e-6,
        position=NoPositions(),
        max_length=v.num_patches,
        attention_bias=True,
        mlp_bias=True,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        initializer_range=config.initializer_range,
    )


class PlainTower(nnx.Module):
    """Patches with learned positions, blocks that see the whole image, a norm."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v, tower = config.vision_as(PlainVisionConfig), tower_config(config)
        self.config = config
        self.patch = PatchEmbedding((v.patch_size**2 * v.channels,), ("pixels",), v.width, init)
        self.position = Embedding(v.num_patches, v.width, "position", config.initializer_range, init)
        self.final_norm = layer_norm(tower, init)
        self.layers = init.stack(lambda init: Block(tower, init), v.num_layers)

    def __call__(self, images: Float[Array, "N height width channels"]) -> Float[Array, "N P V"]:
        v, tower = self.config.vision_as(PlainVisionConfig), tower_config(self.config)
        if images.shape[1:] != (v.image_size, v.image_size, v.channels):
            raise ValueError(
                f"images are {images.shape[1:]}, the model takes {v.image_size, v.image_size, v.channels}"
            )
        x = self.patch(cut_patches(images, v.patch_size, "last").astype(tower.compute_dtype))
        x = x + self.position.table.astype(x.dtype)[None]
        context = AttentionContext(jnp.zeros(x.shape[:2], jnp.int32), causal=False)
        return self.final_norm(apply_blocks([self.layers], x, context, tower).x)


class PlainProjector(nnx.Module):
    """Two-layer GELU MLP from the vision width to the decoder's (as in LLaVA-1.5)."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v, d = config.vision_as(PlainVisionConfig).width, config.width
        self.hidden = init.normal((v, d), ("embed", "mlp"), v**-0.5)
        self.hidden_bias = init.zeros((d,), ("mlp",))
        self.output = init.normal((d, d), ("mlp", "embed"), d**-0.5)
        self.output_bias = init.zeros((d,), ("embed",))

    def __call__(self, x: Float[Array, "N P V"]) -> Float[Array, "N P D"]:
        x = jax.nn.gelu(linear(x, self.hidden, self.hidden_bias), approximate=False)
        return linear(x, self.output, self.output_bias)


class PlainEncoder(Encoder):
    def __init__(self, config: ModelConfig, init: Initializer):
        self.vision = PlainTower(config, init)
        self.projector = PlainProjector(config, init)

    def __call__(self, batch: Mapping[str, Any]) -> Encoded:
        """Image tokens of float32[B, n, height, width, channels]: n * patches for each row."""
        images = batch["images"]
        rows = images.shape[0]
        tokens = self.projector(self.vision(images.reshape(-1, *images.shape[2:])))
        return Encoded(tokens.reshape(rows, -1, tokens.shape[-1]))
