"""Native sparse attention, skill injection and in-context-learning flow analysis on one JAX model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.checkpoints import load_model
    from jaxlab.models import activations, forward, generate

__version__ = "0.1.0"
__all__ = ["__version__", "activations", "forward", "generate", "load_model"]

_HOMES = {
    "activations": "jaxlab.models",
    "forward": "jaxlab.models",
    "generate": "jaxlab.models",
    "load_model": "jaxlab.checkpoints",
}


def __getattr__(name: str) -> Any:
    """Imports jax only when a model is asked for: the help of the command line does without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
