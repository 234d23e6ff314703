"""Mllama (Llama 3.2 Vision): a tower over the tiles of each image, and layers of the decoder that read them.

Images are float [B, images, tiles, channels, height, width], zeros where an image has fewer tiles, with
aspect_ratio_ids int[B, images] (from 1; 0: no image), aspect_ratio_mask int[B, images, tiles], 1 on tiles
that are there, and cross_attention_mask int[B, T, images, tiles], 1 on those that a token sees; without it
every token sees all. Images take no places of the text: layers between those of the language model read them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxlab.models.block import Block, BlockOutput
from jaxlab.models.config import MllamaVisionConfig, ModelConfig, NoPositions
from jaxlab.models.context import AttentionContext
from jaxlab.models.full_attention import softmax_attention
from jaxlab.models.initializer import Initializer, repeat
from jaxlab.models.kv_cache import CrossCache, LayerCache
from jaxlab.models.layers import Norm, linear
from jaxlab.models.stack import Between, apply_blocks
from jaxlab.models.taps import NO_TAP, Tap, read_outputs
from jaxlab.models.vision.encoder import Encoded, Encoder, on_host
from jaxlab.models.vision.patches import PatchEmbedding, cut_patches

EPSILON = 1e-5
"""In the norms before and after the layers of the tower."""
MULTIPLE = 8
"""Tiles are filled up to a multiple of so many patches, which the others see."""


class GatedBlock(Block):
    """What attention and the MLP add is weighted by the tanh of a number each."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__(config, init)
        self.attention_gate = init.zeros((1,), ("gate",))
        self.mlp_gate = init.zeros((1,), ("gate",))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        *,
        kind: str = "full",
        tap: Tap = NO_TAP,
        cache: LayerCache | None = None,
    ) -> BlockOutput:
        """The tower's layers over all tiles of an image."""
        attended = self.attention(self.attention_input(x), context, kind=kind, tap=tap, cache=cache)
        x = x + _gate(self.attention_gate, x) * attended.out
        assert self.mlp is not None
        assert self.mlp_norm is not None
        x = x + _gate(self.mlp_gate, x) * self.mlp(self.mlp_norm(x))
        return BlockOutput(x, attended, None)


class CrossBlock(GatedBlock):
    """A layer of the decoder whose attention reads images instead of the text."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__(config, init)
        self.scale = config.score_scale

    def project(self, images: Float[Array, "B S D"]) -> tuple[Array, Array]:
        """Keys and values [B, S, Hkv, K] of images."""
        _, k, v = self.attention.project(images)
        return k, v

    def read(
        self,
        x: Float[Array, "B T D"],
        keys: Float[Array, "B S Hkv Dk"],
        values: Float[Array, "B S Hkv Dv"],
        visible: Bool[Array, "B T S"] | None,
    ) -> Float[Array, "B T D"]:
        """The residual stream after this layer.

        As the model was trained, a token that sees no tile attends to all of them and skips the MLP.
        """
        mask = jnp.ones((*x.shape[:2], keys.shape[1]), bool) if visible is None else visible
        sees = jnp.any(mask, axis=-1, keepdims=True)
        q = self.attention.project(self.attention_input(x))[0]
        out = softmax_attention(q, keys, values, mask | ~sees, scale=self.scale)
        x = x + _gate(self.attention_gate, x) * self.attention.project_output(out)
        assert self.mlp is not None
        assert self.mlp_norm is not None
        return x + _gate(self.mlp_gate, x) * jnp.where(sees, self.mlp(self.mlp_norm(x)), 0)


def _gate(gate: nnx.Param, x: Array) -> Array:
    """The tanh of a gate, with as many axes as `x`."""
    return jnp.tanh(gate.astype(x.dtype)).reshape((1,) * x.ndim)


def tower_config(config: ModelConfig) -> ModelConfig:
    """The vision transformer in the decoder's terms."""
    v = config.vision_as(MllamaVisionConfig)
    return ModelConfig(
        vocab_size=1,
        width=v.width,
        num_layers=v.num_layers,
        num_heads=v.num_heads,
        mlp="plain",
        mlp_width=v.mlp_width,
        activation=v.activation,
        norm="layer",
        norm_eps=v.norm_eps,
        position=NoPositions(),
        mlp_bias=True,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        initializer_range=config.initializer_range,
    )


def global_config(config: ModelConfig) -> ModelConfig:
    """The same of the layers over all tiles."""
    count = config.vision_as(MllamaVisionConfig).num_global_layers
    return dataclasses.replace(tower_config(config), num_layers=count)


class GatedTable(nnx.Module):
    """Embeddings, weighted by the tanh of a number."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], std: float, init: Initializer):
        self.gate = init.zeros((1,), ("gate",))
        self.table = init.normal(shape, axes, std)

    def of_tiles(self, ratios: Array, dtype: jax.typing.DTypeLike) -> Float[Array, "N tiles 1 V"]:
        """What is added to all patches of a tile, by the aspect ratio of its image."""
        table = self.table.astype(dtype)[ratios][:, :, None]
        return _gate(self.gate, table) * table


class GatedPositions(GatedTable):
    """Positions of patches, and the same for each tile of each aspect ratio."""

    def __init__(self, tiles: tuple[int, int], positions: int, config: ModelConfig, init: Initializer):
        std, width = config.initializer_range, config.vision_as(MllamaVisionConfig).width
        super().__init__((positions, width), ("position", "embed"), std, init)
        axes = ("ratio", "tile", "position", "embed")
        self.tiles = init.normal((*tiles, positions, width), axes, std)

    def __call__(self, ratios: Array, dtype: jax.typing.DTypeLike) -> Float[Array, "N tiles P V"]:
        of_tiles = self.tiles.astype(dtype)[ratios]
        gate = _gate(self.gate, of_tiles)
        return (1 - gate) * self.table.astype(dtype)[None, None] + gate * of_tiles


class MllamaTower(nnx.Module):
    """Embeddings of patches, positions and tiles, and the layers over all tiles of an image."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v, std = config.vision_as(MllamaVisionConfig), config.initializer_range
        tower, tiles = tower_config(config), (len(v.aspect_ratios) + 1, v.max_tiles)
        self.config = config
        shape, axes = (v.channels, v.patch_size, v.patch_size), ("channels", "pixels", "pixels")
        self.patch = PatchEmbedding(shape, axes, v.width, init, bias=False)
        self.class_token = init.normal((v.width,), ("embed",), std)
        self.position = GatedPositions(tiles, v.num_patches + 1, config, init)
        of_tiles = ((*tiles, v.width), ("ratio", "tile", "embed"), std)
        self.tiles_before, self.tiles_after = GatedTable(*of_tiles, init), GatedTable(*of_tiles, init)
        self.pre_norm, self.post_norm = (Norm((v.width,), "layer", EPSILON, init) for _ in range(2))
        self.global_layers = repeat(GatedBlock(global_config(config), init), v.num_global_layers)
        self.layers = init.stack(lambda init: Block(tower, init), v.num_layers)

    def __call__(
        self, images: Float[Array, "N tiles C y x"], ratios: Array, filled: Bool[Array, "N tiles"]
    ) -> Float[Array, "N tiles P W"]:
        """Of each patch, the class token first: the output, and those of the layers that are read."""
        v, tower = self.config.vision_as(MllamaVisionConfig), tower_config(self.config)
        count, tiles = filled.shape
        x = cut_patches(images.reshape(-1, *images.shape[2:]), v.patch_size, "first")
        x = self.patch(x.astype(self.config.compute_dtype)).reshape(count, tiles, -1, v.width)
        x = x + self.tiles_before.of_tiles(ratios, x.dtype)
        first = self.class_token.astype(x.dtype)[None, None, None]
        x = jnp.concatenate([jnp.broadcast_to(first, (count, tiles, 1, v.width)), x], axis=2)
        x = self.pre_norm(x + self.position(ratios, x.dtype))
        patches = x.shape[2]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -patches % MULTIPLE), (0, 0)))
        length = x.shape[2]
        nothing = ~(filled[:, :, None] & (jnp.arange(length) < patches)[None, None])
        rows = (count, tiles * length)
        context = AttentionContext(
            jnp.zeros(rows, jnp.int32), causal=False, apart=jnp.broadcast_to(nothing.reshape(rows), rows)
        )
        layers = tuple(sorted(set(v.read_layers)))
        taps = read_outputs(tower, rows, layers)
        done = apply_blocks([self.layers], x.reshape(*rows, v.width), context, tower, taps=taps)
        x = self.post_norm(done.x).reshape(count, tiles, length, v.width)
        x = (x + self.tiles_after.of_tiles(ratios, x.dtype)).reshape(*rows, v.width)
        x = apply_blocks([self.global_layers], x, context, global_config(self.config)).x
        outputs = [x]
        if layers:  # the outputs of a number of the width stand side by side
            order = np.asarray([layers.index(layer) for layer in v.read_layers])
            read = done.activations["residual_post"][order]
            outputs.append(jnp.moveaxis(read, 0, -1).reshape(*rows, -1).astype(x.dtype))
        joined = jnp.concatenate(outputs, axis=-1)
        return joined.reshape(count, tiles, length, -1)[:, :, :patches]


class MllamaProjector(nnx.Module):
    """One matrix, and the decoder's layers that read the images."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v = config.vision_as(MllamaVisionConfig)
        size = v.width * (1 + len(v.read_layers))
        self.output = init.normal((size, config.width), ("mlp", "embed"), size**-0.5)
        self.output_bias = init.zeros((config.width,), ("embed",))
        reads = dataclasses.replace(config.language, qk_norm="head")
        self.cross_layers = repeat(CrossBlock(reads, init), len(v.cross_layers))

    def keys_and_values(self, images: Float[Array, "B S D"]) -> tuple[Array, Array]:
        """Of every layer, [n, B, S, Hkv, K]."""
        graphdef, params = nnx.split(self.cross_layers)
        return jax.lax.map(lambda layer: nnx.merge(graphdef, layer).project(images), params)


class MllamaEncoder(Encoder):
    vision: MllamaTower
    projector: MllamaProjector

    def __init__(self, config: ModelConfig, init: Initializer):
        self.config = config
        self.vision = MllamaTower(config, init)
        self.projector = MllamaProjector(config, init)

    def __call__(self, batch: Mapping[str, Any]) -> Encoded:
        """No tokens, but keys and values for the layers that read the images."""
        images = jnp.asarray(batch["images"])
        rows, count = images.shape[:2]
        ratios, filled = jnp.asarray(batch["aspect_ratio_ids"]), jnp.asarray(batch["aspect_ratio_mask"]) != 0
        features = self.vision(
            images.reshape(rows * count, *images.shape[2:]),
            ratios.reshape(-1),
            filled.reshape(rows * count, -1),
        )
        patches = features.shape[2]
        states = linear(features, self.projector.output, self.projector.output_bias)
        keys, values = self.projector.keys_and_values(states.reshape(rows, -1, states.shape[-1]))
        visible = None
        if "cross_attention_mask" in batch:
            of_tiles = jnp.asarray(batch["cross_attention_mask"]) != 0
            of_tiles = of_tiles.reshape(*of_tiles.shape[:2], -1)
            visible = jnp.repeat(of_tiles, patches, axis=-1)
        return Encoded(cross=CrossCache(keys, values, visible))

    def between(self, cross: CrossCache) -> Between:
        """The layers that read the images, each before the layer of the text that follows it."""
        v = self.config.vision_as(MllamaVisionConfig)
        graphdef, params = nnx.split(self.projector.cross_layers)

        def apply(index: int, x: Array) -> Array:
            layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], params))
            visible = cross.visible
            if visible is not None:
                visible = jnp.broadcast_to(visible, (*x.shape[:2], visible.shape[-1]))
            return layer.read(x, cross.keys[index], cross.values[index], visible)

        return Between(tuple(number - i for i, number in enumerate(v.cross_layers)), apply)

    @staticmethod
    def prepare(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """Nothing is added: what goes with the images is checked.

        Raises:
          ValueError: shapes that do not fit, images that the text has no token for, or ratios that the model
            does not know.
        """
        v = config.vision_as(MllamaVisionConfig)
        rows, length = batch["tokens"].shape
        shape = tuple(batch["images"].shape)
        count = shape[1] if len(shape) == 6 else 0
        expected = (rows, count, v.max_tiles, v.channels, v.image_size, v.image_size)
        if shape != expected:
            raise ValueError(f"images are {shape}, the model takes {('B', 'images', *expected[2:])}")
        wanted = {
            "aspect_ratio_ids": (rows, count),
            "aspect_ratio_mask": (rows, count, v.max_tiles),
            "cross_attention_mask": (rows, length, count, v.max_tiles),
        }
        for name, fits in wanted.items():
            found = tuple(batch[name].shape) if name in batch else None
            if found != fits and not (found is None and name == "cross_attention_mask"):
                raise ValueError(f"{name} must be {fits} beside these images, is {found}")
        if isinstance(batch["aspect_ratio_ids"], jax.core.Tracer) or isinstance(
            batch["tokens"], jax.core.Tracer
        ):
            return {}
        ratios = on_host(batch, "aspect_ratio_ids")
        if (ratios < 0).any() or (ratios > len(v.aspect_ratios)).any():
            raise ValueError(
                f"aspect_ratio_ids {ratios.tolist()} are beyond the {len(v.aspect_ratios)} ratios"
            )
        places = (np.asarray(batch["tokens"]) == v.image_token).sum(axis=1).tolist()
        if places != (given := (ratios > 0).sum(axis=1).tolist()):
            raise ValueError(f"the texts have {places} tokens of images, there are {given} images")
        return {}
