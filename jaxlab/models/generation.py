"""Greedy and sampled generation with a KV cache."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab.distributed import compile_together
from jaxlab.models.batch import Batch, Params, check_tokens
from jaxlab.models.config import ModelConfig, RopeConfig
from jaxlab.models.decoder import forward, real_tokens
from jaxlab.models.kv_cache import Cache, init_cache
from jaxlab.models.mesh import on_several_devices
from jaxlab.models.sampling import Sampling, fold_in, sample, seen_tokens
from jaxlab.models.sharding import to_host
from jaxlab.models.vision.encoders import prepare_batch


def stream(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    key: Key[Array, "..."] | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yield the next token of every sequence, `max_new_tokens` times.

    Args:
      batch: the prompts as `forward` takes them; prompts of different lengths are padded at the right, with
        segment_ids 1 on tokens and 0 on padding, and go on where each one ends.
      temperature: 0 takes the most likely token (the lowest id on a tie); otherwise logits are divided by it
        and sampled with `key`.
      top_k: sample from so many of the most likely tokens; 0: from all.
      top_p: sample from the most likely tokens that together have this probability; 1: from all.
      min_p: sample from tokens with at least this part of the highest probability; 0: from all.
      repetition_penalty: logits of tokens that the prompt or the text holds are divided by it where they are
        positive, and multiplied where negative; 1: none. It counts without sampling too.
      key: one key, or one for each row: then a row is drawn as it would be alone with its key.
      prefill_chunk: prompts are read so many tokens at a time, in memory that does not grow with their length
        but for the cache; None reads them at once. Prompts with images or positions are read at once only.

    Raises:
      ValueError: sampling without a key, or options of it that make no sense, an empty prompt, one that is
        packed or padded at the left, tokens that the embedding has no row for, more tokens than
        config.max_length, or a prefill_chunk below 1 or for prompts that are more than tokens.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if temperature > 0 and key is None:
        raise ValueError("sampling (temperature > 0) needs a key")
    tokens = np.asarray(batch["tokens"])
    batch_size, prompt_len = tokens.shape
    if prompt_len == 0:
        raise ValueError("the prompt is empty")
    segments = None
    if "segment_ids" in batch:
        segments = np.asarray(batch["segment_ids"])
        if (segments[:, 0] != 1).any() or (segments[:, 1:] > segments[:, :-1]).any() or (segments < 0).any():
            raise ValueError(
                "segment_ids of prompts must be 1 on their tokens, then 0 on padding at the right"
            )
    check_tokens(tokens, config)
    if prompt_len + max_new_tokens > config.max_length:
        raise ValueError(
            f"{prompt_len} prompt tokens and {max_new_tokens} new ones exceed max_length {config.max_length}"
        )
    lengths = np.full(batch_size, prompt_len) if segments is None else segments.sum(axis=1)
    longest, made, size = int(lengths.max()), [], prompt_len + max_new_tokens
    settled, limit = _settled(config, longest), _limit(config, longest)
    if longest <= limit < longest + max_new_tokens - 1 and set(batch) - {"tokens", "segment_ids"}:
        raise ValueError(
            f"prompts that are more than tokens cannot grow past {limit} tokens, where positions change"
        )
    key = jax.random.key(0) if key is None else key
    logits, cache = _read_prompts(params, batch, settled, size, prefill_chunk)
    seen, values = None, sampling.values
    if "repetition_penalty" in values:
        seen = jnp.asarray(seen_tokens(tokens, segments, config.vocab_size))
    token = sample(logits, fold_in(key, 0), values, seen)
    for i in range(1, max_new_tokens):
        made.append(to_host(token))
        yield made[-1]
        if longest + i == limit + 1:  # wavelengths change: what was kept is read anew with the others
            settled = _settled(config, longest + i)
            logits, cache = _read_prompts(params, _grown(tokens, lengths, made), settled, size, prefill_chunk)
            seen = None if seen is None else _with(seen, token)
            token = sample(logits, fold_in(key, i), values, seen)
            continue
        token, cache, seen = decode_step(
            params, {"tokens": token[:, None]}, cache, fold_in(key, i), values, seen, settled
        )
    if max_new_tokens > 0:
        yield to_host(token)


def generate(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    key: Key[Array, "..."] | None = None,
    stop_token: int | None = None,
    prefill_chunk: int | None = None,
) -> Int[np.ndarray, "B new"]:
    """The tokens of `stream`, collected; the options are its.

    After its first `stop_token` a sequence holds nothing else; when every sequence has made one, it ends.

    Raises:
      ValueError: as `stream` does.
    """
    made: list[np.ndarray] = []
    stopped = np.zeros(batch["tokens"].shape[0], bool)
    for token in stream(
        params,
        batch,
        config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
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


def _settled(config: ModelConfig, length: int) -> ModelConfig:
    """The model that reads texts of at most `length` tokens: longrope's factors are those of this length."""
    rope = config.position
    if not isinstance(rope, RopeConfig) or rope.scaling != "longrope":
        return config
    factors = rope.long_factors if length > rope.original_length else rope.short_factors
    rope = dataclasses.replace(rope, short_factors=factors, long_factors=factors)
    return dataclasses.replace(config, position=rope)


def _limit(config: ModelConfig, length: int) -> int:
    """Tokens after which another `_settled` model goes on with texts of `length`; -1: none does."""
    rope = config.position
    changes = isinstance(rope, RopeConfig) and rope.scaling == "longrope" and length <= rope.original_length
    return config.rope.original_length if changes else -1


def _grown(tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"], made: list[np.ndarray]) -> Batch:
    """Prompts of these lengths, and what was made after them, padded at the right."""
    new = np.stack(made, axis=1)
    grown = np.zeros((len(tokens), tokens.shape[1] + new.shape[1]), np.int32)
    for row, length in enumerate(lengths):
        grown[row, : length + new.shape[1]] = np.concatenate([tokens[row, :length], new[row]])
    ends = (lengths + new.shape[1])[:, None]
    return {"tokens": grown, "segment_ids": (np.arange(grown.shape[1])[None] < ends).astype(np.int32)}


def _read_prompts(
    params: Params, batch: Batch, config: ModelConfig, size: int, chunk: int | None
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the last token of each row, and a cache for `size` tokens that holds them."""
    rows = batch["tokens"].shape[0]
    cache = _empty_cache(config, rows, size)
    logits = jnp.zeros((rows, config.vocab_size), jnp.float32)
    for part in [batch] if chunk is None else _chunks(batch, chunk):
        logits, cache = prefill(params, prepare_batch(part, config), cache, logits, config)
    return logits, cache


def _with(seen: Bool[Array, "B V"], token: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """The tokens that each row holds, with one more."""
    return seen.at[jnp.arange(len(seen)), token].set(True)


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


def _empty_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """On a mesh each device makes its own part: the whole may fit on none."""
    make = jax.jit(init_cache, static_argnums=(0, 1, 2)) if on_several_devices() else init_cache
    return make(config, batch_size, length)


@compile_together
@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache", "logits"))
def prefill(
    params: Params, batch: Batch, cache: Cache, logits: Float[Array, "B V"], config: ModelConfig
) -> tuple[Float[Array, "B V"], Cache]:
    """The part of prompts in a batch: logits after the last token of each row; those given where it has none.

    Args:
      cache, logits: given away.
    """
    read = real_tokens(batch)
    last = jnp.maximum(read - 1, 0)[:, None]
    new, intermediates = forward(params, batch, config, cache=cache, logit_positions=last)
    return jnp.where((read > 0)[:, None], new[:, 0], logits), intermediates["cache"]


@compile_together
@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache", "seen"))
def decode_step(
    params: Params,
    batch: Batch,
    cache: Cache,
    key: Key[Array, "..."],
    values: dict[str, Array],
    seen: Bool[Array, "B V"] | None,
    config: ModelConfig,
) -> tuple[Int[Array, " B"], Cache, Bool[Array, "B V"] | None]:
    """The token after one token of each row, the cache with it, and what has been seen.

    Args:
      values: options of `sample`.
      cache, seen: given away.
    """
    logits, intermediates = forward(params, batch, config, cache=cache)
    if seen is not None:
        seen = _with(seen, batch["tokens"][:, 0])
    return sample(logits[:, 0], key, values, seen), intermediates["cache"], seen
