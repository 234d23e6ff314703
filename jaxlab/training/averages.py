"""An exponential moving average of the parameters, kept beside them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxlab.errors import ConfigError
from jaxlab.models import Params


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the parameters."""

    decay: float = 0.999
    """How much of the average stays at a step; after n steps at most (1 + n) / (10 + n), so that the first
    parameters do not stay in it."""
    evaluate: bool = True
    """Evaluate the average beside the parameters."""
    export: bool = False
    """Keep the average as the trained model, instead of the parameters."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"must be in [0, 1), is {self.decay}", key="decay")


class EmaState(NamedTuple):
    """The state of `keep_average`."""

    made: Int[Array, ""]
    """Updates made."""
    average: Params
    inner: optax.OptState


def keep_average(inner: optax.GradientTransformation, config: EmaConfig) -> optax.GradientTransformation:
    """`inner`, with the moving average of the parameters that its updates lead to."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), params, inner.init(params))

    def update(grads: Any, state: EmaState, params: Any = None, **extra: Any) -> tuple[Any, EmaState]:
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        n = state.made.astype(jnp.float32) + 1
        step = 1 - jnp.minimum(config.decay, (1 + n) / (10 + n))
        average = optax.incremental_update(optax.apply_updates(params, updates), state.average, step)
        return updates, EmaState(state.made + 1, average, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(optimizer: optax.OptState) -> Params | None:
    """The average in an optimizer's state, or None if it keeps none."""
    while optimizer is not None and not isinstance(optimizer, EmaState):
        optimizer = getattr(optimizer, "inner", None)
    return None if optimizer is None else optimizer.average
