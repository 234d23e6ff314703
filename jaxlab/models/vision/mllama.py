"""Mllama's parameters (Llama 3.2 Vision): it reads no images yet, but can be merged and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from flax import nnx

from jaxlab.models.config import ModelConfig
from jaxlab.models.modules import Layer, Norm, Numbers, Params, normal, zeros
from jaxlab.models.vision.connectors import refuse, stacked
from jaxlab.models.vision.tower import Tower
from jaxlab.models.vision.vit import tower_config


class GatedLayer(Layer):
    """What attention and the MLP add is weighted by the tanh of a number each."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        super().__init__(config, numbers)
        self.attention_gate = zeros((1,), ("gate",))
        self.mlp_gate = zeros((1,), ("gate",))


class VisionEdges(nnx.Module):
    """Embeddings of patches, positions and tiles, and the layers over all tiles of an image."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        v, m, std = config.vision, config.vision.mllama, config.initializer_range
        tower, ratios, positions = tower_config(config), len(m.aspect_ratios) + 1, v.num_patches + 1
        axes = ("channels", "pixels", "pixels", "embed")
        shape = (v.channels, v.patch_size, v.patch_size, v.width)
        self.patch = nnx.Dict(table=normal(numbers, shape, axes, (v.channels * v.patch_size**2) ** -0.5))
        self.class_token = normal(numbers, (v.width,), ("embed",), std)
        self.position = nnx.Dict(
            gate=zeros((1,), ("gate",)),
            table=normal(numbers, (positions, v.width), ("position", "embed"), std),
            tiles=normal(
                numbers,
                (ratios, m.max_tiles, positions, v.width),
                ("ratio", "tile", "position", "embed"),
                std,
            ),
        )
        for name in ("tiles_before", "tiles_after"):
            table = normal(numbers, (ratios, m.max_tiles, v.width), ("ratio", "tile", "embed"), std)
            setattr(self, name, nnx.Dict(gate=zeros((1,), ("gate",)), table=table))
        self.pre_norm, self.post_norm = Norm(tower), Norm(tower)
        over = dataclasses.replace(tower, num_layers=m.num_global_layers)
        self.global_layers = stacked(GatedLayer(over, numbers), m.num_global_layers)


class Projector(nnx.Module):
    """One matrix, and the decoder's layers that read the images."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        m, size = config.vision.mllama, config.vision.width * (1 + len(config.vision.mllama.read_layers))
        self.output = normal(numbers, (size, config.width), ("mlp", "embed"), size**-0.5)
        self.output_bias = zeros((config.width,), ("embed",))
        reads = dataclasses.replace(config.language, qk_norm="head")
        self.cross_layers = stacked(GatedLayer(reads, numbers), len(m.cross_layers))


def layer(config: ModelConfig, numbers: Numbers) -> nnx.Module:
    return Layer(tower_config(config), numbers)


def encode(params: Params, batch: Mapping[str, Any], config: ModelConfig) -> NoReturn:
    refuse(config)


def prepare(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    refuse(config)


TOWER = Tower(edges=VisionEdges, layer=layer, projector=Projector, encode=encode, prepare=prepare)
