"""What happens to an update whose loss or gradient is far off or not finite, and which batches a run passes
by when it goes back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.distributed import is_main
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import write_json

_LEAST_SPREAD = 0.01
"""Of the mean: a window of nearly equal values makes no spike of the next one."""


@dataclass(frozen=True)
class SpikesConfig:
    """Updates with a loss or a gradient norm that is not finite, or is far above those before."""

    action: Literal["stop", "skip", "rollback"] = "stop"
    """stop: end the run where something is not finite; nothing that is not finite is ever saved. skip: leave
    the update out. rollback: go back to the newest checkpoint, and pass by the batches from there to here."""
    sigmas: float = 6.0
    """skip, rollback: what lies so many standard deviations above the mean of the window is a spike."""
    window: int = 128
    """Updates that mean and deviation are taken over; half of them have to be there first."""
    most: int = 10
    """Updates skipped in a row, or times gone back, after which the run ends."""

    def __post_init__(self) -> None:
        if self.sigmas <= 0:
            raise ConfigError(f"must be positive, is {self.sigmas}", key="sigmas")
        for name, least in (("window", 2), ("most", 1)):
            if not least <= getattr(self, name) <= 1 << 20:
                raise ConfigError(f"must be from {least} to {1 << 20}, is {getattr(self, name)}", key=name)


class SpikesState(NamedTuple):
    """The state of `skip_spikes`."""

    history: Float[Array, "2 window"]
    """Losses and gradient norms of the last updates that were made."""
    made: Int[Array, ""]
    """Updates made."""
    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]
    """Skipped since the last one that was made."""
    inner: optax.OptState


def skip_spikes(inner: optax.GradientTransformation, config: SpikesConfig) -> optax.GradientTransformation:
    """`inner`, which does not see an update that is a spike: no parameter, moment or schedule moves then.

    The rule is OLMo's skip-step optimizer's (Groeneveld et al., 2024; OLMo-core): loss and gradient norm
    against mean + `sigmas` standard deviations of the last `window` ones. `update` takes `loss`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SpikesState:
        zero = jnp.zeros((), jnp.int32)
        history = jnp.zeros((2, config.window), jnp.float32)
        return SpikesState(history, zero, zero, zero, inner.init(params))

    def update(
        grads: Any, state: SpikesState, params: Any = None, *, loss: Float[Array, ""], **extra: Any
    ) -> tuple[Any, SpikesState]:
        seen = jnp.stack([loss, optax.tree.norm(grads)]).astype(jnp.float32)
        spike = is_spike(seen, state.history, state.made, config)
        updates, inner_state = jax.lax.cond(
            spike,
            lambda: (jax.tree.map(jnp.zeros_like, grads), state.inner),
            lambda: inner.update(grads, state.inner, params, loss=loss, **extra),
        )
        one = spike.astype(jnp.int32)
        written = state.history.at[:, state.made % config.window].set(seen)
        return updates, SpikesState(
            jnp.where(spike, state.history, written),
            state.made + (1 - one),
            state.skipped + one,
            (state.in_a_row + one) * one,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def is_spike(
    seen: Float[Array, "2"], history: Float[Array, "2 window"], count: Int[Array, ""], config: SpikesConfig
) -> Bool[Array, ""]:
    """Whether loss and gradient norm are a spike after `count` updates; `history` is a ring of the last."""
    known = (jnp.arange(config.window) < count)[None]
    number = jnp.clip(count, 1, config.window).astype(jnp.float32)
    mean = jnp.sum(history, axis=1, where=known) / number
    spread = jnp.sqrt(jnp.sum((history - mean[:, None]) ** 2, axis=1, where=known) / number)
    limit = mean + config.sigmas * jnp.maximum(spread, _LEAST_SPREAD * jnp.abs(mean))
    far = jnp.any(seen > limit) & (count >= config.window // 2)
    return far | ~jnp.isfinite(seen).all()


def skipped(optimizer: optax.OptState) -> tuple[int, int]:
    """Updates skipped so far and in a row, of a state of `skip_spikes`; (0, 0) of any other."""
    if not isinstance(optimizer, SpikesState):
        return 0, 0
    return int(optimizer.skipped), int(optimizer.in_a_row)


class Rollbacks:
    """How often a run went back, in a file of its folder, and so which batch each step reads."""

    def __init__(self, path: Path) -> None:
        """Reads the file if it is there.

        Raises:
          UserError: it is damaged.
        """
        self.path = path
        self.made: list[tuple[int, int]] = []
        """(the step that was gone back to, batches passed by), in order."""
        if not path.exists():
            return
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            self.made = [(int(one["to"]), int(one["batches"])) for one in told]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged; --overwrite begins the run anew") from error

    def batch_of(self, step: int) -> int:
        """The number of the batch that is read after `step` steps."""
        return step + sum(batches for to, batches in self.made if to <= step)

    def add(self, to: int, seen_at: int) -> None:
        """Notes that the run goes back to step `to` from a spike that was seen at step `seen_at`."""
        self.made.append((to, seen_at - to))
        if is_main():
            write_json(self.path, [{"to": to, "batches": batches} for to, batches in self.made])
