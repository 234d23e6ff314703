"""Mllama's parameters (Llama 3.2 Vision): it reads no images yet, but can be merged and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from flax import nnx

from jaxlab.models.block import Block
from jaxlab.models.config import MllamaVisionConfig, ModelConfig, NoPositions
from jaxlab.models.initializer import Initializer, repeat
from jaxlab.models.layers import layer_norm
from jaxlab.models.vision.connectors import refuse
from jaxlab.models.vision.encoder import Encoder
from jaxlab.models.vision.patches import PatchEmbedding


class GatedBlock(Block):
    """What attention and the MLP add is weighted by the tanh of a number each."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__(config, init)
        self.attention_gate = init.zeros((1,), ("gate",))
        self.mlp_gate = init.zeros((1,), ("gate",))


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


class GatedTable(nnx.Module):
    """Embeddings, weighted by the tanh of a number."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], std: float, init: Initializer):
        self.gate = init.zeros((1,), ("gate",))
        self.table = init.normal(shape, axes, std)


class GatedPositions(GatedTable):
    """Positions of patches, and the same for each tile of each aspect ratio."""

    def __init__(self, tiles: tuple[int, int], positions: int, config: ModelConfig, init: Initializer):
        std, width = config.initializer_range, config.vision_as(MllamaVisionConfig).width
        super().__init__((positions, width), ("position", "embed"), std, init)
        axes = ("ratio", "tile", "position", "embed")
        self.tiles = init.normal((*tiles, positions, width), axes, std)


class MllamaTower(nnx.Module):
    """Embeddings of patches, positions and tiles, and the layers over all tiles of an image."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v, std = config.vision_as(MllamaVisionConfig), config.initializer_range
        tower, tiles = tower_config(config), (len(v.aspect_ratios) + 1, v.max_tiles)
        shape, axes = (v.channels, v.patch_size, v.patch_size), ("channels", "pixels", "pixels")
        self.patch = PatchEmbedding(shape, axes, v.width, init, bias=False)
        self.class_token = init.normal((v.width,), ("embed",), std)
        self.position = GatedPositions(tiles, v.num_patches + 1, config, init)
        of_tiles = ((*tiles, v.width), ("ratio", "tile", "embed"), std)
        self.tiles_before, self.tiles_after = GatedTable(*of_tiles, init), GatedTable(*of_tiles, init)
        self.pre_norm, self.post_norm = layer_norm(tower, init), layer_norm(tower, init)
        over_tiles = dataclasses.replace(tower, num_layers=v.num_global_layers)
        self.global_layers = repeat(GatedBlock(over_tiles, init), v.num_global_layers)
        self.layers = init.stack(lambda init: Block(tower, init), v.num_layers)


class MllamaProjector(nnx.Module):
    """One matrix, and the decoder's layers that read the images."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v = config.vision_as(MllamaVisionConfig)
        size = v.width * (1 + len(v.read_layers))
        self.output = init.normal((size, config.width), ("mlp", "embed"), size**-0.5)
        self.output_bias = init.zeros((config.width,), ("embed",))
        reads = dataclasses.replace(config.language, qk_norm="head")
        self.cross_layers = repeat(GatedBlock(reads, init), len(v.cross_layers))


class MllamaEncoder(Encoder):
    def __init__(self, config: ModelConfig, init: Initializer):
        self.config = config
        self.vision = MllamaTower(config, init)
        self.projector = MllamaProjector(config, init)

    def __call__(self, batch: Mapping[str, Any]) -> NoReturn:
        refuse(self.config)

    @staticmethod
    def prepare(batch: Mapping[str, Any], config: ModelConfig) -> NoReturn:
        refuse(config)
