"""What every vision encoder is: a tower that reads images, and a projector to the decoder's width."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.config import ModelConfig
from jaxlab.models.initializer import Initializer
from jaxlab.models.kv_cache import CrossCache
from jaxlab.models.stack import Between


class Encoded(NamedTuple):
    """Images as tokens of the decoder's width, or as what layers of the decoder read."""

    tokens: Float[Array, "*rows P D"] | None = None
    """[B, P, D]: those of each row. [P, D]: of the whole batch, as its rows have placeholders for them."""
    deep: Float[Array, "n P D"] | None = None
    """What DeepStack adds to these tokens after each of the decoder's first n layers."""
    cross: CrossCache | None = None
    """Instead of tokens, for layers of the decoder that read the images (Mllama)."""


class Encoder(nnx.Module):
    """A vision tower and its projector; the names of both are those of the parameters."""

    vision: nnx.Module
    projector: nnx.Module

    def __init__(self, config: ModelConfig, init: Initializer):
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Any]) -> Encoded:
        """The image tokens of a prepared batch."""
        raise NotImplementedError

    def between(self, cross: CrossCache) -> Between:
        """The layers that read the images, of a model that has such."""
        raise NotImplementedError

    @staticmethod
    def prepare(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """On the host: what the batch needs besides and follows from sizes of images (positions, windows);
        keys of the batch that it returns are added or replaced."""
        return {}


def on_host(batch: Mapping[str, Any], name: str) -> np.ndarray:
    """A value of the batch on the host.

    Raises:
      ValueError: it is missing or traced.
    """
    if name not in batch:
        raise ValueError(f"the batch lacks {name}, which the family's processor gives beside the images")
    if isinstance(batch[name], jax.core.Tracer):
        raise ValueError(f"{name} is traced; call prepare_batch outside of jit")
    return np.asarray(batch[name])
