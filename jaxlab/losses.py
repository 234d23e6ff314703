"""The loss: cross-entropy of targets, what training adds to it, and whether a whole answer is right."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.models import Batch, ModelConfig, Params, forward


def target_losses(
    logits: Float[Array, "B T V"], batch: Batch
) -> tuple[Float[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """Cross-entropy (nats) of tokens 1 ... T-1 given those before, and which of them are targets.

    A target is a token where `loss_mask` is set (everywhere, if the batch has none) and that follows a token
    of its own segment; padding (segment 0) is never one.
    """
    tokens = batch["tokens"]
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
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


def loss_sum(params: Params, batch: Batch, config: ModelConfig) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy (nats) of the targets, and their number.

    With experts the balance loss, times its weight, is added to the loss of every target; with NSA's
    auxiliary selector or indexer its loss, which trains nothing else.
    """
    logits, intermediates = forward(params, batch, config)
    losses, mask = target_losses(logits, batch)
    total, count = jnp.sum(losses, where=mask), jnp.sum(mask, dtype=jnp.float32)
    if config.moe is not None and config.moe.balance_loss:
        total += config.moe.balance_loss * count * jnp.mean(intermediates["balance_loss"])
    if "selector_loss" in intermediates:
        total += count * jnp.mean(intermediates["selector_loss"])
    return total, count


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
