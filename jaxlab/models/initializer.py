"""Parameters of modules: how they begin, and how a module is bound to a plain dict of them.

A module (flax.nnx) takes an `Initializer` as its last argument and makes each parameter in one line: shape,
logical axes, scale. Nothing else is made at that moment: models live as plain nested dicts, and `bind` gives
a module the parameters of one, while a program is traced.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxlab.models.batch import Params
from jaxlab.models.low_rank import is_low_rank


class Axes(tuple):
    """Logical axis names of one parameter: a leaf, since only exact tuples are nodes of a tree."""


class Initializer:
    """Initial parameters in the order in which modules ask for them; zeros if no numbers are drawn.

    One draw serves a whole module: XLA takes about half a second to compile each draw for a CPU.
    """

    def __init__(self, drawn: Float[Array, " size"] | None = None, layers_key: Key[Array, ""] | None = None):
        """
        Args:
          drawn: standard normal numbers; None: zeros, to learn shapes and axes.
          layers_key: of the layers, which draw numbers of their own.
        """
        self.drawn = drawn
        self.layers_key = layers_key
        self.taken = 0

    def numbers(self, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Standard normal numbers, float32."""
        start, self.taken = self.taken, self.taken + math.prod(shape)
        if self.drawn is None:
            return jnp.zeros(shape, jnp.float32)
        return self.drawn[start : self.taken].reshape(shape)

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
        return nnx.Param(std * self.numbers(shape), axes=axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        return self.full(shape, axes, 0.0)

    def full(self, shape: tuple[int, ...], axes: tuple[str, ...], value: float) -> nnx.Param:
        return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)

    def stack[M: nnx.Module](
        self, make: Callable[["Initializer"], M], count: int, fold: int | None = None
    ) -> M:
        """`count` modules, their parameters stacked on a leading axis, for a scan to apply.

        Each draws from a key of its own, split from `layers_key` (with `fold` folded in), one after the
        other: only one module's numbers exist besides the result.
        """
        if self.layers_key is None:
            return repeat(make(Initializer()), count)
        key = self.layers_key if fold is None else jax.random.fold_in(self.layers_key, fold)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: repeat(make(Initializer()), count)))
        one = lambda key: values(draw(make, key))
        return cast(M, nnx.merge(graphdef, jax.lax.map(one, jax.random.split(key, count))))


def repeat[M: nnx.Module](module: M, count: int) -> M:
    """`count` modules that begin alike, their parameters stacked on a leading axis."""
    for _, param in nnx.iter_graph(module):
        if isinstance(param, nnx.Param):
            axes, shape = param.get_metadata("axes"), (count, *param.shape)
            param.set_value(jnp.broadcast_to(param[...], shape))
            param.set_metadata(axes=("layers", *axes))
    return module


def draw[M: nnx.Module](
    make: Callable[[Initializer], M], key: Key[Array, ""], layers_key: Key[Array, ""] | None = None
) -> M:
    """The module with initial parameters drawn from `key`; layers that it stacks draw from `layers_key`."""
    counted = Initializer()
    nnx.eval_shape(lambda: make(counted))
    return make(Initializer(jax.random.normal(key, (counted.taken,), jnp.float32), layers_key))


def values(module: nnx.Module) -> Params:
    """The parameters of a module, or their shapes where it is abstract, as a plain nested dict."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def axes(module: nnx.Module) -> Params:
    """The logical axes of a module's parameters, in the tree of `values`."""
    is_param = lambda leaf: isinstance(leaf, nnx.Param)
    named = jax.tree.map(
        lambda p: Axes(p.get_metadata("axes")), nnx.state(module, nnx.Param), is_leaf=is_param
    )
    return nnx.to_pure_dict(named)


def abstract[M: nnx.Module](kind: Callable[..., M], *settings: Any) -> M:
    """The module `kind(*settings)` with shapes in place of parameters."""
    return nnx.eval_shape(lambda: kind(*settings, Initializer()))


def bind[M: nnx.Module](params: Mapping[str, Any], kind: Callable[..., M], *settings: Any) -> M:
    """The module `kind(*settings)` with these parameters.

    Args:
      params: a plain nested dict with the names of the module's attributes.
      settings: what the module is made from besides its initializer; hashable.

    Raises:
      ValueError: a parameter is missing, or the module has none of that name.
    """
    graphdef, names = _structure(kind, *settings)
    found = _names(params)
    if found != names:
        wrong = sorted(found ^ names)
        which = "have no" if wrong[0] in names else "have an unknown"
        raise ValueError(f"the parameters {which} {wrong[0]}: they are not those of the config")
    return cast(M, nnx.merge(graphdef, params))


@functools.lru_cache(maxsize=256)
def _structure(kind: Callable[..., nnx.Module], *settings: Any) -> tuple[Any, frozenset[str]]:
    module = abstract(kind, *settings)
    return nnx.graphdef(module), _names(values(module))


def _names(params: Mapping[str, Any]) -> frozenset[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank)
    return frozenset(jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
