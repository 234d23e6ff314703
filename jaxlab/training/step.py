"""One training step: loss, gradient accumulation, update. Pure functions; the task jits `train_step`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab.losses import CROSS_ENTROPY, LossConfig, Measures, loss_and_measures
from jaxlab.models import Batch, ModelConfig, MoEConfig, Params
from jaxlab.training.spikes import SpikesState


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
    loss: LossConfig = CROSS_ENTROPY,
    sources: int = 0,
    join: Callable[[Params, Key[Array, ""]], Params] | None = None,
    seed: int = 0,
) -> tuple[State, dict[str, Any]]:
    """The state after one update on `batch`, and what was measured: loss, gradient norm, and what else the
    model and `loss` have to tell.

    With `accumulation` > 1 the batch is read in so many parts, one after the other; the gradient is that of
    the mean loss over all targets of the whole batch, whatever their spread over the parts.

    Args:
      sources: how many there are that source_ids of the batch number; 0: it has none.
      join: makes all parameters of those that are trained, and of a key of what is random in a step
        (`Trainable.join`); None: all are trained.
      seed: of that key.
    """
    random = jax.random.fold_in(jax.random.key(seed), state.step)
    measure = functools.partial(loss_and_measures, config=config, loss=loss, sources=sources)

    def measured(params: Params, batch: Batch, part: Int[Array, ""]) -> tuple[Array, Measures]:
        if join is not None:
            params = join(params, jax.random.fold_in(random, part))
        return measure(params, batch)

    gradient = jax.value_and_grad(measured, has_aux=True)
    zero = jnp.zeros((), jnp.int32)
    if accumulation == 1:
        (total, seen), grads = gradient(state.params, batch, zero)
    else:
        # Part i takes rows i, i + accumulation, ...: every device then holds an equal share of every part.
        split = lambda x: x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        parts = jax.tree.map(split, batch)
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(state.params, *part)), None)
        shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts), zero)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        ((total, seen), grads), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accumulation)))
        seen = seen.mean_of(accumulation)

    count = jnp.maximum(seen.targets, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    mean = total / count
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer steps
        update = optax.with_extra_args_support(optimizer).update
        updates, optimizer_state = update(grads, state.optimizer, state.params, loss=mean)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": mean, "gradient_norm": optax.tree.norm(grads)}
    if seen.z_loss is not None:
        metrics["z_loss"] = seen.z_loss / count
    if seen.source_losses is not None:
        metrics |= {"source_losses": seen.source_losses, "source_targets": seen.source_targets}
    if config.moe is not None and seen.expert_load is not None:
        metrics |= _experts(seen, config.moe)
        if config.moe.bias_rate and _learns_balance(params):
            made = optimizer_state.in_a_row == 0 if isinstance(optimizer_state, SpikesState) else None
            params = balanced(params, seen.expert_load, config.moe, made)
    return State(state.step + 1, params, optimizer_state), metrics


def balanced(
    params: Params, load: Float[Array, "layers E"], moe: MoEConfig, made: Bool[Array, ""] | None = None
) -> Params:
    """Parameters with the biases of the choice moved towards an even load, without a loss (arXiv 2408.15664,
    algorithm 1); not at all where an update was not `made`."""
    experts = params["layers"]["moe"]
    moves = moe.bias_rate * jnp.sign(1 / moe.num_experts - load)
    if made is not None:
        moves = jnp.where(made, moves, 0)
    bias = experts["choice_bias"] + moves.astype(experts["choice_bias"].dtype)
    return {**params, "layers": {**params["layers"], "moe": {**experts, "choice_bias": bias}}}


def _learns_balance(params: Params) -> bool:
    """Whether the biases of the choice are among what is trained."""
    return "choice_bias" in params.get("layers", {}).get("moe", {})


def _experts(seen: Measures, moe: MoEConfig) -> dict[str, Any]:
    """The load of experts, for the log: of the fullest of any layer, over an even share (1 is even), the mean
    over layers of that, and the share of choices that were dropped."""
    assert seen.expert_load is not None
    fullest = moe.num_experts * jnp.max(seen.expert_load, axis=1)
    metrics = {"expert_load_max": jnp.max(fullest), "expert_load_mean": jnp.mean(fullest)}
    if moe.capacity_factor is not None and seen.dropped_choices is not None:
        metrics["dropped_choices"] = jnp.mean(seen.dropped_choices)
    return metrics
