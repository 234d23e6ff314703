"""What is read off logits: losses of targets, and whether a whole answer is right."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.models import Batch


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
