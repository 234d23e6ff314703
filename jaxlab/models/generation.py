"""Greedy and sampled generation with a KV cache."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlab.models.batch import Batch
from jaxlab.models.config import ModelConfig
from jaxlab.models.decoder import forward
from jaxlab.models.initializer import Params
from jaxlab.models.kv_cache import Cache, init_cache
from jaxlab.models.vision.encoders import prepare_batch


def stream(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yield the next token of every sequence, `max_new_tokens` times.

    Args:
      batch: the prompts as `forward` takes them; prompts of different lengths are padded at the right, with
        segment_ids 1 on tokens and 0 on padding, and go on where each one ends.
      temperature: 0 takes the most likely token (the lowest id on a tie); otherwise logits are divided by it
        and sampled with `key`.
      prefill_chunk: prompts are read so many tokens at a time, in memory that does not grow with their length
        but for the cache; None reads them at once. Prompts with images or positions are read at once only.

    Raises:
      ValueError: sampling without a key, a negative temperature, an empty prompt, one that is packed or
        padded at the left, more tokens than config.max_length, or a prefill_chunk below 1 or for prompts that
        are more than tokens.
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
    chunks = [batch] if prefill_chunk is None else _chunks(batch, prefill_chunk)
    key = jax.random.key(0) if key is None else key
    cache = init_cache(config, batch_size, prompt_len + max_new_tokens)
    logits = jnp.zeros((batch_size, config.vocab_size), jnp.float32)
    for chunk in chunks:
        logits, cache = _read(params, prepare_batch(chunk, config), cache, logits, config)
    token = sample(logits, jax.random.fold_in(key, 0), temperature)
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
    prefill_chunk: int | None = None,
) -> Int[np.ndarray, "B new"]:
    """The tokens of `stream`, collected.

    After its first `stop_token` a sequence holds nothing else; when every sequence has made one, it ends.
    """
    made: list[np.ndarray] = []
    stopped = np.zeros(batch["tokens"].shape[0], bool)
    for token in stream(
        params,
        batch,
        config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=key,
        prefill_chunk=prefill_chunk,
    ):
        if stop_token is not None:
            token = np.where(stopped, stop_token, token).astype(np.int32)
            stopped |= token == stop_token
        made.append(token)
        if stop_token is not None and stopped.all():
            break
    return np.stack(made, axis=1) if made else np.zeros((len(stopped), 0), np.int32)


def _chunks(batch: Batch, size: int) -> Iterator[Batch]:
    """Prompts cut into chunks of `size` tokens, the last one padded: one program reads them all."""
    if size < 1:
        raise ValueError(f"prefill_chunk must be at least 1, is {size}")
    if set(batch) - {"tokens", "segment_ids"}:
        more = ", ".join(sorted(set(batch) - {"tokens", "segment_ids"}))
        raise ValueError(f"prompts with {more} cannot be read in chunks; leave prefill_chunk out")
    tokens = np.asarray(batch["tokens"])
    segment_ids = np.asarray(batch.get("segment_ids", np.ones_like(tokens)))
    pad = ((0, 0), (0, -tokens.shape[1] % size))
    tokens, segment_ids = np.pad(tokens, pad), np.pad(segment_ids, pad)
    for start in range(0, tokens.shape[1], size):
        part = slice(start, start + size)
        yield {"tokens": tokens[:, part], "segment_ids": segment_ids[:, part]}


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache", "logits"))
def _read(
    params: Params, batch: Batch, cache: Cache, logits: Float[Array, "B V"], config: ModelConfig
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the last token of each row; those given where the batch holds none of the row's."""
    new, intermediates = forward(params, batch, config, cache=cache)
    read = intermediates["cache"].length - cache.length  # tokens of each row that are not padding
    new = jnp.take_along_axis(new, jnp.maximum(read - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((read > 0)[:, None], new, logits), intermediates["cache"]


@partial(jax.jit, static_argnames=("config", "temperature"), donate_argnames=("cache",))
def _step(
    params: Params, batch: Batch, cache: Cache, key: Key[Array, ""], config: ModelConfig, temperature: float
) -> tuple[Int[Array, " B"], Cache]:
    logits, intermediates = forward(params, batch, config, cache=cache)
    return sample(logits[:, 0], key, temperature), intermediates["cache"]


def sample(logits: Float[Array, "B V"], key: Key[Array, ""], temperature: float) -> Int[Array, " B"]:
    """The most likely token at temperature 0, a sampled one otherwise."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)
