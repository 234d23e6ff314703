"""How likely continuations of prompts are, token by token, through the cache that generation uses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.distributed import compile_together
from jaxlab.models.batch import Batch, Params, check_tokens
from jaxlab.models.config import ModelConfig
from jaxlab.models.decoder import forward
from jaxlab.models.generation import prefill
from jaxlab.models.kv_cache import init_cache
from jaxlab.models.vision.encoders import prepare_batch


def continuation_log_probs(
    params: Params,
    batch: Batch,
    continuations: Int[np.ndarray, "n B C"],
    mask: Bool[np.ndarray, "n B C"],
    config: ModelConfig,
) -> tuple[Float[Array, "n B C"], Bool[Array, "n B C"], Float[Array, " B"]]:
    """Log-probabilities (nats) of the tokens of n continuations of each prompt, which tokens are the
    likeliest ones where they stand, and the entropy of what follows each prompt.

    The prompts are read once.

    Args:
      batch: prompts as `stream` takes them: padded at the right, with segment_ids 1 and 0 there.
      mask: which tokens there are; those of each continuation come first, then padding. 0 on padding.

    Raises:
      ValueError: an empty prompt, tokens that the embedding has no row for, or more than config.max_length
        besides the last one, which is not read.
    """
    tokens = np.asarray(batch["tokens"])
    check_tokens(tokens, config)
    check_tokens(continuations, config)
    lengths = np.full(len(tokens), tokens.shape[1])
    if "segment_ids" in batch:
        lengths = (np.asarray(batch["segment_ids"]) != 0).sum(1)
    if not lengths.all():
        raise ValueError("a prompt is empty")
    if (longest := int((lengths + mask.sum(2)).max()) - 1) > config.max_length:
        raise ValueError(f"{longest} tokens exceed max_length {config.max_length}")
    found: tuple[Array, Array, Array] = _log_probs(
        params, prepare_batch(batch, config), jnp.asarray(continuations), jnp.asarray(mask), config
    )
    return found


@compile_together
@partial(jax.jit, static_argnames="config")
def _log_probs(
    params: Params,
    batch: Batch,
    continuations: Int[Array, "n B C"],
    mask: Bool[Array, "n B C"],
    config: ModelConfig,
) -> tuple[Array, Array, Array]:
    rows, length = batch["tokens"].shape
    after = continuations.shape[2] - 1  # nothing is asked of what follows the last token
    cache = init_cache(config, rows, length + after)
    first, cache = prefill(params, batch, cache, jnp.zeros((rows, config.vocab_size), jnp.float32), config)

    def one(given: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens, there = given
        before = first[:, None]
        if after:
            read: Batch = {"tokens": tokens[:, :-1], "segment_ids": there[:, :-1].astype(jnp.int32)}
            before = jnp.concatenate([before, forward(params, read, config, cache=cache).logits], axis=1)
        log_p = jax.nn.log_softmax(before, axis=-1)
        own = jnp.take_along_axis(log_p, tokens[:, :, None], axis=-1)[..., 0]
        return jnp.where(there, own, 0.0), there & (jnp.argmax(before, axis=-1) == tokens)

    found, likeliest = jax.lax.map(one, (continuations, mask))
    log_p = jax.nn.log_softmax(first, axis=-1)
    return found, likeliest, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
