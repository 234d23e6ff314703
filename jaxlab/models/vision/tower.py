"""What a kind of vision tower is made of."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.config import ModelConfig
from jaxlab.models.modules import Numbers, Params


class Encoded(NamedTuple):
    """Images as tokens of the decoder's width."""

    tokens: Float[Array, "*rows P D"]
    """[B, P, D]: those of each row. [P, D]: of the whole batch, as its rows have placeholders for them."""
    deep: Float[Array, "n P D"] | None = None
    """What DeepStack adds to these tokens after each of the decoder's first n layers."""


def nothing(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    return {}


class Tower(NamedTuple):
    """A kind of vision tower with its projector."""

    edges: Callable[[ModelConfig, Numbers], nnx.Module]
    """What stands around the layers, under "vision"."""
    layer: Callable[[ModelConfig, Numbers], nnx.Module]
    """One layer, under "vision.layers" stacked."""
    projector: Callable[[ModelConfig, Numbers], nnx.Module]
    """Under "projector"."""
    encode: Callable[[Params, Mapping[str, Any], ModelConfig], Encoded]
    """Pure, jittable: the images of a prepared batch."""
    prepare: Callable[[Mapping[str, Any], ModelConfig], dict[str, Any]] = nothing
    """On the host: what the batch needs besides and follows from sizes of images (positions, windows); keys
    of the batch that it returns are added or replaced."""
