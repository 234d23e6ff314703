"""The next token from logits: the steps of Hugging Face's generation, in its order.

Repetition penalty (arXiv 1909.05858), temperature, top-k (arXiv 1805.04833), top-p (arXiv 1904.09751), min-p
(arXiv 2407.01082), then a draw; without temperature the most likely token after the penalty.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

LEAST_TEMPERATURE = 1e-6
"""Below it logits that are divided by it leave float32; 0 takes the most likely token."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults leave out all steps: the most likely token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0, or finite and at least {LEAST_TEMPERATURE}, is {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, is {self.top_k} (0 keeps all tokens)")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, is {getattr(self, name)}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be positive and finite, is {self.repetition_penalty} (1 is none)"
            )

    @property
    def steps(self) -> tuple[str, ...]:
        """The fields that do something: a program is compiled for these, whatever their values."""
        asked = {
            "repetition_penalty": self.repetition_penalty != 1,
            "temperature": self.temperature > 0,
            "top_k": self.top_k > 0,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
        }
        needs_draw = ("top_k", "top_p", "min_p")
        return tuple(
            name for name, on in asked.items() if on and (self.temperature or name not in needs_draw)
        )

    @property
    def values(self) -> dict[str, Array]:
        """Values of the steps, float32[] but for top_k, int32[]."""
        kinds = {"top_k": jnp.int32}
        return {name: jnp.asarray(getattr(self, name), kinds.get(name, jnp.float32)) for name in self.steps}


def process_logits(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, values: dict[str, Array]
) -> Float[Array, "B V"]:
    """The logits that are drawn from: float32, -inf where a token is left out.

    Args:
      seen: tokens of each row so far, of the prompt too; only the penalty needs it.
      values: of the steps that are done (`Sampling.values`).
    """
    x = logits.astype(jnp.float32)
    if "repetition_penalty" in values:
        assert seen is not None
        penalty = values["repetition_penalty"]
        x = jnp.where(seen, jnp.where(x < 0, x * penalty, x / penalty), x)
    if "temperature" in values:
        x = x / values["temperature"]
    if "top_k" in values:
        last = jnp.minimum(values["top_k"], x.shape[1]) - 1
        x = _without(x, x < jnp.take(-jnp.sort(-x, axis=1), last, axis=1)[:, None])
    if "top_p" in values:
        order = jnp.argsort(x, axis=1)
        mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(x, order, axis=1), axis=1), axis=1)
        out = (mass <= 1 - values["top_p"]).at[:, -1].set(False)
        x = _without(x, jnp.take_along_axis(out, jnp.argsort(order, axis=1), axis=1))
    if "min_p" in values:
        p = jax.nn.softmax(x, axis=1)
        x = _without(x, p < values["min_p"] * jnp.max(p, axis=1, keepdims=True))
    return x


def _without(x: Float[Array, "B V"], out: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    return jnp.where(out, -jnp.inf, x)


def sample(
    logits: Float[Array, "B V"],
    key: Key[Array, "..."],
    values: dict[str, Array],
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """The most likely token where there is no temperature (the lowest id on a tie), a drawn one otherwise.

    Args:
      key: one for all rows, which are drawn apart; or one for each, so that a row is drawn as if alone.
      values: of the steps that are done (`Sampling.values`).
      seen: see `process_logits`.
    """
    x = process_logits(logits, seen, values)
    if "temperature" not in values:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    if key.ndim:
        return jax.vmap(jax.random.categorical)(key, x).astype(jnp.int32)
    return jax.random.categorical(key, x, axis=-1).astype(jnp.int32)


def fold_in(key: Key[Array, "..."], step: int | Int[Array, ""]) -> Key[Array, "..."]:
    """A key, or each of several, for a step."""
    return (
        jax.vmap(lambda one: jax.random.fold_in(one, step))(key)
        if key.ndim
        else jax.random.fold_in(key, step)
    )


def seen_tokens(
    tokens: Int[np.ndarray, "B T"], segment_ids: Int[np.ndarray, "B T"] | None, vocab_size: int
) -> Bool[np.ndarray, "B V"]:
    """The tokens of each prompt, those that are never made left aside."""
    counted = tokens < vocab_size if segment_ids is None else (tokens < vocab_size) & (segment_ids > 0)
    seen = np.zeros((len(tokens), vocab_size), bool)
    rows = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
    seen[rows[counted], tokens[counted]] = True
    return seen
