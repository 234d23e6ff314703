"""Functional Flax models: one decoder, with or without vision, on one parameter pytree."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.models.attention import Cache, init_cache
    from jaxlab.models.config import (
        ModelConfig,
        MoEConfig,
        RopeConfig,
        VisionConfig,
    )
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
    from jaxlab.models.sparse_config import NSAConfig, SparsityConfig
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
    "SparsityConfig",
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

_HOMES = {
    "attention": "Cache init_cache",
    "config": "MoEConfig ModelConfig RopeConfig VisionConfig",
    "sparse_config": "NSAConfig SparsityConfig",
    "decoder": "Batch forward positions_of",
    "generation": "generate stream",
    "modules": "Params",
    "parameters": "abstract_params cast_floats count_params init_params language_model logical_axes",
    "probe": "Probe",
    "vision": "prepare_batch",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Imports jax only for what needs it: configs are read without."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
