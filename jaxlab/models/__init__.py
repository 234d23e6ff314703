"""Functional Flax models: one decoder, with or without vision, on one parameter pytree."""

from jaxlab.models.attention import Cache, init_cache
from jaxlab.models.config import ModelConfig, MoEConfig, NSAConfig, RopeConfig, VisionConfig
from jaxlab.models.decoder import Batch, forward, positions_of
from jaxlab.models.generation import generate, stream
from jaxlab.models.modules import Params
from jaxlab.models.parameters import (
    abstract_params,
    cast_floats,
    count_params,
    init_params,
    language_model,
    logical_axes,
)
from jaxlab.models.probe import Probe
from jaxlab.models.vision import prepare_batch

__all__ = [
    "Batch",
    "Cache",
    "MoEConfig",
    "ModelConfig",
    "NSAConfig",
    "Params",
    "Probe",
    "RopeConfig",
    "VisionConfig",
    "abstract_params",
    "cast_floats",
    "count_params",
    "forward",
    "generate",
    "init_cache",
    "init_params",
    "language_model",
    "logical_axes",
    "positions_of",
    "prepare_batch",
    "stream",
]
