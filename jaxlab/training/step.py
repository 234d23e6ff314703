"""One training step: loss, gradient accumulation, update. Pure functions; the task jits `train_step`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab.evaluation.measures import exact_match, target_losses
from jaxlab.models import Batch, ModelConfig, Params, forward


class State(NamedTuple):
    """What a step changes and a checkpoint holds."""

    step: Int[Array, ""]
    params: Params
    """float32 master parameters."""
    optimizer: optax.OptState


def loss_sum(params: Params, batch: Batch, config: ModelConfig) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy (nats) of the targets, and their number.

    With experts the balance loss, times its weight, is added to the loss of every target; with NSA's
    auxiliary selector its loss, which trains nothing else.
    """
    logits, intermediates = forward(params, batch, config)
    losses, mask = target_losses(logits, batch)
    total, count = jnp.sum(losses, where=mask), jnp.sum(mask, dtype=jnp.float32)
    if config.moe.num_experts and config.moe.balance_loss:
        total += config.moe.balance_loss * count * jnp.mean(intermediates["balance_loss"])
    if "selector_loss" in intermediates:
        total += count * jnp.mean(intermediates["selector_loss"])
    return total, count


def train_step(
    state: State,
    batch: Batch,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[State, dict[str, Any]]:
    """The state after one update on `batch`, and loss and gradient norm.

    With `accumulation` > 1 the batch is read in so many parts, one after the other; the gradient is that of
    the mean loss over all targets of the whole batch, whatever their spread over the parts.
    """
    gradient = jax.value_and_grad(loss_sum, has_aux=True)
    if accumulation == 1:
        (total, count), grads = gradient(state.params, batch, config)
    else:

        def add(carry: tuple[Any, ...], part: Batch) -> tuple[tuple[Any, ...], None]:
            (part_total, part_count), part_grads = gradient(state.params, part, config)
            total, count, grads = carry
            return (total + part_total, count + part_count, jax.tree.map(jnp.add, grads, part_grads)), None

        # Part i takes rows i, i + accumulation, ...: every device then holds an equal share of every part.
        split = lambda x: x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
        zero = jnp.zeros((), jnp.float32)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (total, count, grads), _ = jax.lax.scan(add, (zero, zero, zeros), jax.tree.map(split, batch))

    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer steps
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    new = State(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state)
    return new, {"loss": total / count, "gradient_norm": optax.tree.norm(grads)}


@partial(jax.jit, static_argnames="config")
def evaluate_step(params: Params, batch: Batch, config: ModelConfig) -> dict[str, Array]:
    """Sums over a batch: loss and number of targets, exact matches and number of rows."""
    logits, _ = forward(params, batch, config)
    losses, mask = target_losses(logits, batch)
    return {
        "loss": jnp.sum(losses, where=mask),
        "targets": jnp.sum(mask, dtype=jnp.float32),
        "matches": jnp.sum(exact_match(logits, batch), dtype=jnp.float32),
        "rows": jnp.float32(mask.shape[0]),
    }
