"""Learning rates over the steps of a run."""

from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from jaxlab.training.optimizer import OptimizerConfig

Decay = Literal["linear", "cosine", "sqrt"]


def make_schedule(config: "OptimizerConfig", steps: int) -> optax.Schedule:
    """Learning rate as a function of the updates made before, 0 to steps - 1.

    0 at the first update, the peak after `warmup_steps`, and `final_fraction` of the peak at the last one. A
    warm-up that is longer than the training ends at its last update.

    - constant: the peak to the end.
    - linear, cosine: a fall over all steps after the warm-up (cosine: arXiv 1608.03983, one period).
    - wsd: warm-up, stable, decay (arXiv 2404.06395): the peak until the last `decay_fraction` of the steps,
      and a fall over these of the form `decay`.
    - inverse_sqrt: peak * sqrt(warmup / updates) (arXiv 1706.03762); `final_fraction` is not used.
    """
    peak, end = config.learning_rate, config.final_fraction
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    after = steps - 1 - warmup
    match config.schedule:
        case "constant":
            rest = optax.constant_schedule(peak)
        case "inverse_sqrt":
            rest = lambda count: peak * jnp.sqrt(max(warmup, 1) / (max(warmup, 1) + count))
        case "wsd":
            falling = min(max(round(config.decay_fraction * steps), 1), max(after, 1))
            rest = optax.join_schedules(
                [optax.constant_schedule(peak), _fall(config.decay, peak, end, falling)],
                [max(after - falling, 0)],
            )
        case shape:
            rest = _fall(shape, peak, end, max(after, 1))
    if warmup == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])


def _fall(shape: Decay, peak: float, end: float, steps: int) -> optax.Schedule:
    """From the peak to `end` of it in so many steps."""
    if shape == "linear":
        return optax.linear_schedule(peak, end * peak, steps)
    if shape == "cosine":
        return optax.cosine_decay_schedule(peak, steps, end)

    # 1 - sqrt (arXiv 2405.18392).
    return lambda count: peak * (1 - (1 - end) * jnp.sqrt(jnp.clip(count / steps, 0, 1)))
