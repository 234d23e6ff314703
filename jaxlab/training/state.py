"""The state of training: where it lives, and how it begins."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from jaxlab.checkpoints.loading import load_model, load_model_config, load_tokenizer, stored_shapes
from jaxlab.checkpoints.native import check_same_tree
from jaxlab.checkpoints.reference import model_folder
from jaxlab.data.source import Source, check_same_words
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params, abstract_params, init_params
from jaxlab.training.sharding import param_shardings
from jaxlab.training.step import State

# What shows in no shape and makes another function of the same parameters.
_MEANING = (
    "activation", "norm", "norm_offset", "position", "embedding_scale", "parallel", "attention_scale",
    "attention_softcap", "logit_softcap",
)  # fmt: skip


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation) -> State:
    """Shapes and dtypes of the state."""
    params = abstract_params(model)
    step = jax.eval_shape(lambda: jnp.zeros((), jnp.int32))
    return State(step, params, jax.eval_shape(optimizer.init, params))


def state_shardings(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Where each part of the state lives: moments like their parameters, scalars everywhere."""
    params = param_shardings(model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    like_params = jax.tree.structure(params)
    is_params = lambda node: jax.tree.structure(node) == like_params  # type: ignore[operator]  # noqa: E731
    optimizer_state = abstract_state(model, optimizer).optimizer
    place = lambda node: params if is_params(node) else everywhere  # noqa: E731
    moments = jax.tree.map(place, optimizer_state, is_leaf=is_params)
    return State(everywhere, params, moments)  # type: ignore[arg-type]


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: State,
    initial: Path | None = None,
) -> State:
    """The state at step 0, made where it will live: random parameters, under those of `initial`."""

    def make(key: Key[Array, ""], loaded: Params) -> State:
        params = {**init_params(model, key), **loaded}
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    loaded: Params = {}
    if initial is not None:
        theirs = {name: shardings.params[name] for name in stored_shapes(initial)}
        _, loaded, _ = load_model(initial, shardings=theirs, dtype=jnp.float32)
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed), loaded)


def find_initial(reference: str, model: ModelConfig, source: Source) -> Path:
    """The folder of the model that training starts from; only a vision tower and a projector may be new.

    Raises:
      UserError: there is none, or it does not fit `model` or the data.
    """
    folder = model_folder(reference)
    theirs, stored = load_model_config(folder), stored_shapes(folder)
    expected = {
        name: tree
        for name, tree in abstract_params(model).items()
        if name in stored or name not in ("vision", "projector")
    }
    check_same_tree(stored, expected, folder, expected_by="the model to train")
    for name in _MEANING:
        if getattr(theirs, name) != getattr(model, name):
            raise UserError(
                f"{folder}: its {name} is {getattr(theirs, name)}, of the model to train "
                f"{getattr(model, name)}; set model.{name}"
            )
    check_same_words(load_tokenizer(folder), source.tokenizer(), folder)
    return folder
