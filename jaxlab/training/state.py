"""The state of training: where it lives, and how it begins."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from jaxlab.checkpoints import OpenModel, check_same_tree, differences
from jaxlab.data import Source, check_same_words
from jaxlab.distributed import compile_together
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig, Params, RopeConfig, abstract_params, init_params, param_shardings
from jaxlab.retrofit import GATE, retrofit, retrofitted
from jaxlab.training.step import State
from jaxlab.training.trainable import Trainable, find_trainable

# What shows in no shape and makes another function of the same parameters.
_MEANING = (
    "activation",
    "norm",
    "norm_offset",
    "position",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "parallel",
    "attention_scale",
    "attention_softcap",
    "logit_softcap",
)


def abstract_state(model: ModelConfig | Trainable, optimizer: optax.GradientTransformation) -> State:
    """Shapes and dtypes of the state, of a model or of what is trained of it."""
    params = _trainable(model).abstract()
    step = jax.eval_shape(lambda: jnp.zeros((), jnp.int32))
    return State(step, params, jax.eval_shape(optimizer.init, params))


def _trainable(model: ModelConfig | Trainable) -> Trainable:
    return model if isinstance(model, Trainable) else find_trainable(model)


def state_shardings(
    model: ModelConfig | Trainable, optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
    """Where each part of the state lives: moments and averages like their parameters, the rest everywhere."""
    params = _trainable(model).shardings(mesh)
    state = abstract_state(model, optimizer)
    known = {
        _keys(path): (sharding, shape.shape)
        for (path, sharding), shape in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(state.params), strict=True
        )
    }
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        """That of the parameter whose path ends this one, however deep in the optimizer it stands."""
        keys = _keys(path)
        for start in range(len(keys)):
            sharding, shape = known.get(keys[start:], (everywhere, None))
            if shape == leaf.shape:
                return sharding
        return everywhere

    moments = jax.tree_util.tree_map_with_path(place, state.optimizer)
    return State(everywhere, params, moments)  # type: ignore[arg-type]


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


class Initial(NamedTuple):
    """The model that training starts from."""

    opened: OpenModel | None = None
    """None: there is none, all parameters are random."""
    dense: ModelConfig | None = None
    """Its config where it is dense and the model to train has NSA: it is retrofitted. None: its parameters
    are taken as they are."""

    @property
    def folder(self) -> Path | None:
        return None if self.opened is None else self.opened.path


def read_initial(
    initial: Initial, model: ModelConfig, mesh: Mesh, dtype: jax.typing.DTypeLike = jnp.float32
) -> Params:
    """The initial model's parameters, each where the state's will live; {} without one."""
    if initial.opened is None:
        return {}
    shardings = param_shardings(initial.dense or model, mesh)
    theirs = {name: shardings[name] for name in initial.opened.shapes}
    return initial.opened.read(shardings=theirs, dtype=dtype)


def init_state(
    model: ModelConfig | Trainable,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: State,
    loaded: Params,
    *,
    dense: ModelConfig | None = None,
    gate: float = GATE,
) -> State:
    """The state at step 0, made where it will live: random parameters, under those that were `loaded`.

    `dense`: their config, if they are those of a dense model to retrofit (`Initial.dense`); compression and
    window begin with this `gate`.
    """
    trainable = _trainable(model)

    def make(key: Key[Array, ""], loaded: Params) -> State:
        params = _all_params(trainable.model, key, loaded, dense, gate)
        if not trainable.everything:
            params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            params = trainable.begin(params, jax.random.fold_in(key, _ADAPTERS))
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return compile_together(jax.jit(make, out_shardings=shardings))(jax.random.key(seed), loaded)


def init_frozen(
    trainable: Trainable,
    seed: int,
    mesh: Mesh,
    loaded: Params,
    *,
    dtype: jax.typing.DTypeLike,
    dense: ModelConfig | None = None,
    gate: float = GATE,
) -> Params:
    """What is not trained, in `dtype` and where it lives: of `loaded`, else random as `init_state` has it; {}
    where everything is trained."""
    if trainable.everything:
        return {}
    shardings = trainable.frozen(param_shardings(trainable.model, mesh))

    def make(key: Key[Array, ""], loaded: Params) -> Params:
        params = _all_params(trainable.model, key, loaded, dense, gate)
        return jax.tree.map(lambda x: x.astype(dtype), trainable.frozen(params))

    return compile_together(jax.jit(make, out_shardings=shardings))(jax.random.key(seed), loaded)


_ADAPTERS = 2
"""Folded into the key of initial adapters; a retrofit has 1."""


def _all_params(
    model: ModelConfig, key: Key[Array, ""], loaded: Params, dense: ModelConfig | None, gate: float
) -> Params:
    """Random parameters, under those that were loaded."""
    if dense is not None:
        new = jax.random.fold_in(key, 1)
        loaded, _ = retrofit(loaded, dense, model.nsa, key=new, gate=gate)
    return {**init_params(model, key), **loaded}


def find_initial(opened: OpenModel, model: ModelConfig, source: Source) -> Initial:
    """Whether training can start from a model; only a vision tower and a projector may be new.

    A dense model for a `model` with NSA is retrofitted: all else about the two must be the same.

    Raises:
      UserError: it is damaged, or does not fit `model` or the data.
    """
    folder, theirs, stored = opened.path, opened.config, opened.shapes
    dense = None
    if model.attention.kind == "nsa" and theirs.attention.kind != "nsa":
        try:
            retrofitted(theirs, model.nsa)
        except ConfigError as error:
            raise UserError(f"{folder}: it cannot be retrofitted to NSA: {error}") from error
        dense = dataclasses.replace(model, attention=theirs.attention)
    expected = {
        name: tree
        for name, tree in abstract_params(dense or model).items()
        if name in stored or name not in ("vision", "projector")
    }
    check_same_tree(stored, expected, folder, expected_by="the model to train")
    for name in _MEANING if dense is None else _different(theirs, dense):
        of_theirs, of_ours = getattr(theirs, name), getattr(model, name)
        if dense is None and name == "position":  # how rotary positions are stretched may change
            of_theirs, of_ours = (_turning(c) for c in (theirs, model))
        if of_theirs != of_ours:
            raise UserError(
                f"{folder}: its {name} is {of_theirs}, of the model to train {of_ours}; set model.{name}"
            )
    check_same_words(opened.tokenizer, source.tokenizer(), folder)
    return Initial(opened, dense)


def _turning(c: ModelConfig) -> str:
    """Which dimensions of which layers know positions."""
    if not isinstance(c.position, RopeConfig):
        return c.position.kind
    pairs = "neighbours" if c.position.interleaved else "halves"
    layers = "all layers" if all(c.rotary_layers) else f"layers {[*map(int, c.rotary_layers)]}"
    return f"rotary over {c.rotary_dim} dimensions of {layers}, paired as {pairs}"


def _different(theirs: ModelConfig, dense: ModelConfig) -> list[str]:
    """The fields in which a model to retrofit is another function."""
    free = [] if theirs.position.kind == "learned" else ["max_length"]
    return differences(theirs, dense, free if theirs.has_vision else [*free, "vision"])
