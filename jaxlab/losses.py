"""The loss: cross-entropy of targets, what training adds to it, and whether a whole answer is right."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.distributed import compile_together
from jaxlab.errors import ConfigError
from jaxlab.models import Batch, ModelConfig, Params, forward, vocabulary_is_split


@dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy of targets."""

    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, which keeps logits from drifting (PaLM,
    arXiv 2204.02311: 1e-4)."""

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ConfigError(f"must not be negative, is {self.z_loss}", key="z_loss")


CROSS_ENTROPY = LossConfig()
"""Nothing is added."""


def target_losses(
    logits: Float[Array, "B T V"], batch: Batch
) -> tuple[Float[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """Cross-entropy (nats) of tokens 1 ... T-1 given those before, and which of them are targets.

    A target is a token where `loss_mask` is set (everywhere, if the batch has none) and that follows a token
    of its own segment; padding (segment 0) is never one.
    """
    tokens = batch["tokens"]
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    words = log_probs.shape[-1]
    if vocabulary_is_split(words):  # each device has some of the words: it picks none or the one
        is_target = jnp.arange(words)[None, None] == tokens[:, 1:, None]
        losses = -jnp.sum(log_probs, axis=-1, where=is_target)
    else:
        losses = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return losses, target_mask(batch)


def target_mask(batch: Batch) -> Bool[Array, "B targets"]:
    """Which of the tokens 1 ... T-1 are targets."""
    tokens = batch["tokens"]
    mask = batch["loss_mask"][:, 1:] if "loss_mask" in batch else jnp.ones_like(tokens[:, 1:], dtype=bool)
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        mask = mask & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return mask


def exact_match(logits: Float[Array, "B T V"], batch: Batch) -> Bool[Array, " B"]:
    """Whether every target of a row is the most likely token; a row without targets does not match.

    So greedy decoding would have answered right: a wrong token stays wrong whatever follows it.
    """
    mask = target_mask(batch)
    right = jnp.argmax(logits[:, :-1], axis=-1) == batch["tokens"][:, 1:]
    return jnp.all(right | ~mask, axis=1) & jnp.any(mask, axis=1)


class Measures(NamedTuple):
    """What a loss is a sum over, and what training watches beside it."""

    targets: Float[Array, ""]
    """Their number."""
    z_loss: Float[Array, ""] | None = None
    """Sum over targets of the squared logarithm of the normaliser."""
    source_losses: Float[Array, " sources"] | None = None
    """Summed cross-entropy of the targets of each source."""
    source_targets: Float[Array, " sources"] | None = None
    expert_load: Float[Array, "layers E"] | None = None
    """The share of all choices that each routed expert got."""
    dropped_choices: Float[Array, " layers"] | None = None
    """The share of all choices that no expert took, as it was full."""

    def mean_of(self, parts: int) -> "Measures":
        """Of sums over so many parts of a batch: what is a share is averaged."""
        mean = lambda x: None if x is None else x / parts
        return self._replace(expert_load=mean(self.expert_load), dropped_choices=mean(self.dropped_choices))


def loss_and_measures(
    params: Params, batch: Batch, config: ModelConfig, loss: LossConfig = CROSS_ENTROPY, sources: int = 0
) -> tuple[Float[Array, ""], Measures]:
    """Summed loss (nats) of the targets, and what there is to watch.

    With experts the balance loss, times its weight, is added to the cross-entropy of every target; with NSA's
    auxiliary selector or indexer its loss, which trains nothing else; and what `loss` asks for.

    Args:
      sources: how many there are that source_ids int32[B] of the batch number; 0: it has none.
    """
    logits, intermediates = forward(params, batch, config)
    losses, mask = target_losses(logits, batch)
    total, count = jnp.sum(losses, where=mask), jnp.sum(mask, dtype=jnp.float32)
    if config.moe is not None and config.moe.balance_loss:
        total += config.moe.balance_loss * count * jnp.mean(intermediates["balance_loss"])
    if "selector_loss" in intermediates:
        total += count * jnp.mean(intermediates["selector_loss"])
    load, dropped = (intermediates.get(name) for name in ("expert_load", "dropped_choices"))
    measures = Measures(count, expert_load=load, dropped_choices=dropped)
    if loss.z_loss:
        squares = jax.nn.logsumexp(logits[:, :-1], axis=-1) ** 2
        squared = jnp.sum(squares, where=mask)
        measures = measures._replace(z_loss=squared)
        total += loss.z_loss * squared
    if sources:
        of_source = batch["source_ids"][:, None] == jnp.arange(sources, dtype=jnp.int32)[None]
        by_source = lambda rows: jnp.sum(jnp.where(of_source, rows[:, None], 0), axis=0)
        measures = measures._replace(
            source_losses=by_source(jnp.sum(losses, axis=1, where=mask)),
            source_targets=by_source(jnp.sum(mask, axis=1, dtype=jnp.float32)),
        )
    return total, measures


def loss_sum(params: Params, batch: Batch, config: ModelConfig) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss of `loss_and_measures`, and the number of targets."""
    total, measures = loss_and_measures(params, batch, config)
    return total, measures.targets


@compile_together
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
