"""The parameters of a model: `init_params`, `abstract_params` and `logical_axes`, all from its modules."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from jaxlab.models.batch import Params
from jaxlab.models.config import ModelConfig
from jaxlab.models.decoder import Decoder
from jaxlab.models.initializer import abstract, axes, draw, values
from jaxlab.models.vision.encoders import encoder_of


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Initial float32 parameters of `config`: a nested dict, the layers stacked on a leading axis L.

    The first layers of a mixture of experts that have a plain MLP stand apart, in `dense_layers`. Jit it with
    `out_shardings` to make each shard where it will live.
    """
    edges, layers, vision_edges, vision_layers = jax.random.split(key, 4)
    params = values(draw(lambda init: Decoder(config, init), edges, layers))
    if config.has_vision:
        encoder = encoder_of(config)
        params |= values(draw(lambda init: encoder(config, init), vision_edges, vision_layers))
    return params


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of `init_params` without making a number."""
    shapes = [values(module) for module in _modules(config)]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _union(shapes))


def logical_axes(config: ModelConfig) -> Params:
    """Logical axis names of every parameter, in the tree of `init_params`."""
    return _union([axes(module) for module in _modules(config)])


def _modules(config: ModelConfig) -> list[nnx.Module]:
    """What a model is made of, abstract."""
    decoder = abstract(Decoder, config)
    return [decoder, abstract(encoder_of(config), config)] if config.has_vision else [decoder]


def _union(trees: list[Params]) -> Params:
    return {name: tree for part in trees for name, tree in part.items()}


def count_params(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def cast_floats(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """`params` with every floating leaf cast to `dtype`."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, params)
