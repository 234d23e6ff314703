"""The parameters of a model: `init_params`, `abstract_params` and `logical_axes`, all from its modules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from jaxlab.models.config import ModelConfig
from jaxlab.models.modules import Edges, Layer, Numbers, Params
from jaxlab.models.vision import tower_of


def _values(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _axes(make: Callable[[], nnx.Module]) -> Params:
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(lambda p: Axes(p.axes), state, is_leaf=is_param))


class Axes(tuple):
    """Logical axis names of one parameter: a leaf, since only exact tuples are nodes of a tree."""


def _draw(make: Callable[[Numbers], Params], key: Key[Array, ""]) -> Params:
    counted = Numbers()
    jax.eval_shape(lambda: make(counted))
    return make(Numbers(jax.random.normal(key, (counted.taken,), jnp.float32)))


def _stack(layer: Callable[[Numbers], nnx.Module], key: Key[Array, ""], count: int) -> Params:
    """Layers, one after the other: only one layer's numbers exist besides the result."""
    one = lambda k: _draw(lambda numbers: _values(layer(numbers)), k)
    return jax.lax.map(one, jax.random.split(key, count))


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Initial float32 parameters of `config`: a nested dict, the layers stacked on a leading axis L.

    The first layers of a mixture of experts that have a plain MLP stand apart, in `dense_layers`. Jit it with
    `out_shardings` to make each shard where it will live.
    """
    edges, layers, vision_edges, vision_layers = jax.random.split(key, 4)
    params = _draw(lambda numbers: _values(Edges(config, numbers)), edges)
    layer = lambda numbers: Layer(config, numbers)
    params["layers"] = _stack(layer, layers, config.num_layers - config.dense_layers)
    if config.dense_layers:
        dense = lambda numbers: Layer(config, numbers, dense=True)
        key = jax.random.fold_in(layers, config.num_layers)
        params["dense_layers"] = _stack(dense, key, config.dense_layers)
    if not config.has_vision:
        return params
    tower = tower_of(config)

    def vision(numbers: Numbers) -> Params:
        edges = _values(tower.edges(config, numbers))
        return {"vision": edges, "projector": _values(tower.projector(config, numbers))}

    params |= _draw(vision, vision_edges)
    of_tower = lambda numbers: tower.layer(config, numbers)
    params["vision"]["layers"] = _stack(of_tower, vision_layers, config.vision.num_layers)
    return params


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of `init_params` without making a number."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> Params:
    """Logical axis names of every parameter, in the tree of `init_params`."""
    stacked = lambda make: jax.tree.map(lambda a: Axes(("layers", *a)), _axes(make))
    axes = {
        **_axes(lambda: Edges(config, Numbers())),
        "layers": stacked(lambda: Layer(config, Numbers())),
    }
    if config.dense_layers:
        axes["dense_layers"] = stacked(lambda: Layer(config, Numbers(), dense=True))
    if config.has_vision:
        tower = tower_of(config)
        axes["vision"] = _axes(lambda: tower.edges(config, Numbers()))
        axes["vision"]["layers"] = stacked(lambda: tower.layer(config, Numbers()))
        axes["projector"] = _axes(lambda: tower.projector(config, Numbers()))
    return axes


def count_params(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def cast_floats(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """`params` with every floating leaf cast to `dtype`."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, params)


def language_model(params: Params) -> Params:
    """The language model of a VLM: its tree without `vision` and `projector`."""
    return {name: tree for name, tree in params.items() if name not in ("vision", "projector")}
