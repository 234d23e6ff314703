"""One training step: loss, gradient accumulation, update. Pure functions; the task jits `train_step`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from jaxlab.losses import loss_sum
from jaxlab.models import Batch, ModelConfig, Params


class State(NamedTuple):
    """What a step changes and a checkpoint holds."""

    step: Int[Array, ""]
    params: Params
    """float32 master parameters."""
    optimizer: optax.OptState


def train_step(
    state: State,
    batch: Batch,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    join: Callable[[Params, Key[Array, ""]], Params] | None = None,
    seed: int = 0,
) -> tuple[State, dict[str, Any]]:
    """The state after one update on `batch`, and loss and gradient norm.

    With `accumulation` > 1 the batch is read in so many parts, one after the other; the gradient is that of
    the mean loss over all targets of the whole batch, whatever their spread over the parts.

    Args:
      join: makes all parameters of those that are trained, and of a key of what is random in a step
        (`Trainable.join`); None: all are trained.
      seed: of that key.
    """
    random = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(params: Params, batch: Batch, part: Int[Array, ""] | int) -> tuple[Array, Array]:
        if join is not None:
            params = join(params, jax.random.fold_in(random, part))
        return loss_sum(params, batch, config)

    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulation == 1:
        (total, count), grads = gradient(state.params, batch, 0)
    else:

        def add(carry: tuple[Any, ...], numbered: tuple[Array, Batch]) -> tuple[tuple[Any, ...], None]:
            number, part = numbered
            (part_total, part_count), part_grads = gradient(state.params, part, number)
            total, count, grads = carry
            return (total + part_total, count + part_count, jax.tree.map(jnp.add, grads, part_grads)), None

        # Part i takes rows i, i + accumulation, ...: every device then holds an equal share of every part.
        split = lambda x: x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        zero = jnp.zeros((), jnp.float32)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        parts = jnp.arange(accumulation), jax.tree.map(split, batch)
        (total, count, grads), _ = jax.lax.scan(add, (zero, zero, zeros), parts)

    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    mean = total / count
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer steps
        update = optax.with_extra_args_support(optimizer).update
        updates, optimizer_state = update(grads, state.optimizer, state.params, loss=mean)
    new = State(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state)
    return new, {"loss": mean, "gradient_norm": optax.tree.norm(grads)}
