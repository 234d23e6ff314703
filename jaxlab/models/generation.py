"""Greedy and sampled generation with a KV cache."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlab.models.attention import Cache, init_cache
from jaxlab.models.config import ModelConfig
from jaxlab.models.decoder import Batch, forward
from jaxlab.models.modules import Params
from jaxlab.models.vision import prepare_batch


def stream(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yield the next token of every sequence, `max_new_tokens` times.

    Args:
      batch: the prompts as `forward` takes them; prompts of different lengths are padded at the right, with
        segment_ids 1 on tokens and 0 on padding, and go on where each one ends.
      temperature: 0 takes the most likely token (the lowest id on a tie); otherwise logits are divided by it
        and sampled with `key`.

    Raises:
      ValueError: sampling without a key, a negative temperature, an empty prompt, one that is packed or
        padded at the left, or more tokens than config.max_length.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, is {temperature}")
    if temperature > 0 and key is None:
        raise ValueError("sampling (temperature > 0) needs a key")
    batch_size, prompt_len = batch["tokens"].shape
    if prompt_len == 0:
        raise ValueError("the prompt is empty")
    if "segment_ids" in batch:
        segments = np.asarray(batch["segment_ids"])
        if (segments[:, 0] != 1).any() or (segments[:, 1:] > segments[:, :-1]).any() or (segments < 0).any():
            raise ValueError(
                "segment_ids of prompts must be 1 on their tokens, then 0 on padding at the right"
            )
    if prompt_len + max_new_tokens > config.max_length:
        raise ValueError(
            f"{prompt_len} prompt tokens and {max_new_tokens} new ones exceed max_length {config.max_length}"
        )
    key = jax.random.key(0) if key is None else key
    batch = prepare_batch(batch, config)
    cache = init_cache(config, batch_size, prompt_len + max_new_tokens)
    token, cache = _step(params, batch, cache, jax.random.fold_in(key, 0), config, temperature)
    for i in range(1, max_new_tokens):
        yield np.asarray(token)
        token, cache = _step(
            params, {"tokens": token[:, None]}, cache, jax.random.fold_in(key, i), config, temperature
        )
    if max_new_tokens > 0:
        yield np.asarray(token)


def generate(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
    stop_token: int | None = None,
) -> Int[np.ndarray, "B new"]:
    """The tokens of `stream`, collected.

    After its first `stop_token` a sequence holds nothing else; when every sequence has made one, it ends.
    """
    made: list[np.ndarray] = []
    stopped = np.zeros(batch["tokens"].shape[0], bool)
    for token in stream(
        params, batch, config, max_new_tokens=max_new_tokens, temperature=temperature, key=key
    ):
        if stop_token is not None:
            token = np.where(stopped, stop_token, token).astype(np.int32)
            stopped |= token == stop_token
        made.append(token)
        if stop_token is not None and stopped.all():
            break
    return np.stack(made, axis=1) if made else np.zeros((len(stopped), 0), np.int32)


@partial(jax.jit, static_argnames=("config", "temperature"), donate_argnames=("cache",))
def _step(
    params: Params, batch: Batch, cache: Cache, key: Key[Array, ""], config: ModelConfig, temperature: float
) -> tuple[Int[Array, " B"], Cache]:
    logits, intermediates = forward(params, batch, config, cache=cache)
    read = intermediates["cache"].length - cache.length  # tokens of each row that are not padding
    logits = jnp.take_along_axis(logits, read[:, None, None] - 1, axis=1)[:, 0]
    return sample(logits, key, temperature), intermediates["cache"]


def sample(logits: Float[Array, "B V"], key: Key[Array, ""], temperature: float) -> Int[Array, " B"]:
    """The most likely token at temperature 0, a sampled one otherwise."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)
