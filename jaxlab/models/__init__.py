"""Functional Flax models: one decoder, with or without vision, on one parameter pytree."""

from jaxlab.models.attention import Cache, init_cache
from jaxlab.models.config import ModelConfig, MoEConfig, NSAConfig, RopeConfig, VisionConfig
from jaxlab.models.decoder import Batch, forward, positions_of
from jaxlab.models.generation import generate, stream
from jaxlab.models.modules import (
    Params,
    abstract_params,
    cast_floats,
    count_params,
    init_params,
    language_model,
    logical_axes,
)
from jaxlab.models.probe import Probe

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
    "stream",
]
