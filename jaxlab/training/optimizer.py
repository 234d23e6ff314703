"""The optimizer as a config: AdamW with warm-up, decay and clipping, from optax."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from jaxlab.errors import ConfigError
from jaxlab.models import ModelConfig, Params, logical_axes


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps in which it rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How it falls from the peak over the remaining steps."""
    final_fraction: float = 0.1
    """Learning rate at the last step over the peak's, for linear and cosine."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the squared gradients' mean."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and position tables have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    language_scale: float = 1.0
    """Learning rate of a VLM's language model over that of its vision tower and projector; 0 freezes it."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"must be positive, is {getattr(self, name)}", key=name)
        for name in ("warmup_steps", "weight_decay", "clip_norm", "language_scale"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"must be in [0, 1), is {getattr(self, name)}", key=name)
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"must be in [0, 1], is {self.final_fraction}", key="final_fraction")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the updates made before, 0 to steps - 1.

    0 at the first update, the peak after `warmup_steps`, and `final_fraction` of the peak at the last one. A
    warm-up that is longer than the training ends at its last update.
    """
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    decay_steps = max(steps - 1 - warmup, 1)
    if config.schedule == "constant":
        rest = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "linear":
        rest = optax.linear_schedule(
            config.learning_rate, config.final_fraction * config.learning_rate, decay_steps
        )
    else:
        rest = optax.cosine_decay_schedule(config.learning_rate, decay_steps, config.final_fraction)
    if warmup == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), rest], [warmup])


def make_optimizer(config: OptimizerConfig, model: ModelConfig, steps: int) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, steps),
        config.beta1,
        config.beta2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed(model),
    )
    if config.language_scale == 1.0:
        return optax.chain(clip, adamw)
    scale = optax.masked(optax.scale(config.language_scale), _is_language(model))
    return optax.chain(clip, adamw, scale)


def _decayed(model: ModelConfig) -> Params:
    """Matrices decay: two axes or more besides the stacking ones, unless they are positions, biases or scales
    of norms."""

    def decays(path: tuple[Any, ...], axes: tuple[str, ...]) -> bool:
        name = str(path[-1].key)
        size = len([a for a in axes if a not in ("layers", "branch")])
        other = name.endswith("bias") or name in ("scale", "position") or "position" in axes
        return size >= 2 and not other

    return jax.tree_util.tree_map_with_path(decays, logical_axes(model))


def _is_language(model: ModelConfig) -> Params:
    axes = logical_axes(model)
    return {
        name: jax.tree.map(lambda _, n=name: n not in ("vision", "projector"), t) for name, t in axes.items()
    }
