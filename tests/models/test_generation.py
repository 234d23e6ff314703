"""Generation: the cache gives what a full forward gives at every step, greedy and sampled tokens, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import RopeConfig, forward, generate, init_cache, stream
from tests.models import oracle
from tests.models.tiny import draw_params, draw_tokens, make_config

run = jax.jit(forward, static_argnames="config")


@pytest.mark.parametrize(
    "variant",
    [
        "other",
        "sliding",
        "nope",
        "nsa",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("nsa_nope", "nsa_min_max", "nsa_shared")),
    ],
)
def test_decoding_with_a_cache_equals_the_full_forward_at_each_step(variant):
    config = make_config(variant)
    params, tokens = draw_params(config), draw_tokens(config, 2, 14)
    full = [oracle.logits(params, row, config) for row in np.asarray(tokens)]
    # Prompts of 5 and 3 tokens, padded at the right with tokens that must not matter.
    lengths = np.array([5, 3])
    segments = jnp.asarray(np.arange(5)[None] < lengths[:, None], jnp.int32)
    prompt = jnp.where(segments == 1, tokens[:, :5], 7)
    cache = init_cache(config, 2, 14)
    logits, intermediates = run(params, {"tokens": prompt, "segment_ids": segments}, config, cache=cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row][:length], atol=2e-5)
    for step in range(9):
        cache = intermediates["cache"]
        np.testing.assert_array_equal(cache.length, lengths + step)
        token = jnp.stack([tokens[row, length + step] for row, length in enumerate(lengths)])[:, None]
        logits, intermediates = run(params, {"tokens": token}, config, cache=cache)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row, 0], full[row][length + step], atol=2e-5)


def test_greedy_tokens_are_the_most_likely_of_a_full_forward():
    config = make_config()
    params = draw_params(config)
    prompts = [[1, 2, 3, 4], [5, 6]]
    batch = {
        "tokens": jnp.asarray([prompts[0], [*prompts[1], 0, 0]], jnp.int32),
        "segment_ids": jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], jnp.int32),
    }
    made = generate(params, batch, config, max_new_tokens=4)
    for row, prompt in enumerate(prompts):
        sequence = np.asarray([[*prompt, *made[row]]], np.int32)
        padded = jnp.asarray(np.pad(sequence, ((0, 0), (0, 8 - sequence.shape[1]))))  # one shape to compile
        logits = np.asarray(run(params, {"tokens": padded}, config)[0])[0]
        likeliest = logits[len(prompt) - 1 : len(prompt) + 3].argmax(axis=-1)
        np.testing.assert_array_equal(made[row], likeliest)
    stop = int(made[0, 1])
    stopped = generate(params, batch, config, max_new_tokens=4, stop_token=stop)
    for full, cut in zip(made, stopped, strict=True):
        ends = np.flatnonzero(full == stop)
        if len(ends):
            assert (cut[ends[0] :] == stop).all()
            full = full[: ends[0]]
        np.testing.assert_array_equal(cut[: len(full)], full[: cut.shape[0]])


def test_generation_ends_when_all_have_stopped():
    config = make_config()
    params = draw_params(config)
    batch = {"tokens": jnp.asarray([[1, 2, 3, 4]], jnp.int32)}
    first = int(next(stream(params, batch, config, max_new_tokens=4))[0])
    assert generate(params, batch, config, max_new_tokens=4, stop_token=first).tolist() == [[first]]
    assert generate(params, batch, config, max_new_tokens=0).shape == (1, 0)


def test_sampling_depends_on_the_key_alone():
    config = make_config()
    params = draw_params(config)
    batch = {"tokens": jnp.asarray([[1, 2, 3, 4]] * 3, jnp.int32)}
    draw = lambda seed: generate(
        params, batch, config, max_new_tokens=6, temperature=2.0, key=jax.random.key(seed)
    )
    first = draw(0)
    np.testing.assert_array_equal(first, draw(0))
    assert (first != draw(1)).any()
    assert (first[0] != first[1]).any()  # rows are drawn apart


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1, 2]], {"temperature": 1.0}, "needs a key"),
        ([[1, 2]], {"temperature": -1.0}, "must be 0, or finite"),
        ([[1, 2]], {"top_k": -1}, "top_k must not be negative"),
        ([[1, 2]], {"top_p": 1.5}, "top_p must be between 0 and 1"),
        ([[1, 2]], {"min_p": -0.1}, "min_p must be between 0 and 1"),
        ([[1, 2]], {"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ([[1, 13]], {}, "the batch holds token 13, the embedding has 13 rows"),
        ([[-1, 2]], {}, "the batch holds token -1, the embedding has 13 rows"),
        ([[]], {}, "prompt is empty"),
        ([[1] * 23], {}, "23 prompt tokens and 2 new ones exceed max_length 24"),
        ([[1, 2]], {"segments": [[0, 1]]}, "padding at the right"),
        ([[1, 2]], {"segments": [[1, 2]]}, "padding at the right"),
        ([[1, 2]], {"segments": [[0, 0]]}, "padding at the right"),
    ],
)
def test_errors(prompt, options, message):
    config = make_config()
    segments = options.pop("segments", None)
    batch = {"tokens": jnp.asarray(prompt, jnp.int32)}
    if segments is not None:
        batch["segment_ids"] = jnp.asarray(segments, jnp.int32)
    with pytest.raises(ValueError, match=message):
        generate({}, batch, config, max_new_tokens=2, **options)


def test_texts_that_outgrow_short_factors_are_read_anew_with_the_long_ones():
    """As transformers does with Phi-3: tokens kept so far were turned otherwise, in every layer."""
    longrope = {"scaling": "longrope", "factor": 3.0, "original_length": 8}
    rope = RopeConfig(short_factors=(1.0, 1.5), long_factors=(2.0, 9.0), **longrope)
    config = make_config(position=rope)
    params, prompts = draw_params(config), np.asarray(draw_tokens(config, 2, 6))
    lengths, new = np.array([6, 4]), 6
    segments = (np.arange(6)[None] < lengths[:, None]).astype(np.int32)
    batch = {"tokens": jnp.asarray(prompts * segments), "segment_ids": jnp.asarray(segments)}
    made = generate(params, batch, config, max_new_tokens=new, repetition_penalty=1.3)
    texts = np.zeros((2, 12), np.int32)
    for row, length in enumerate(lengths):
        texts[row, : length + new] = [*prompts[row, :length], *made[row]]
    likeliest = {}
    for name, factors in (("short", rope.short_factors), ("long", rope.long_factors)):
        alike = RopeConfig(short_factors=factors, long_factors=factors, **longrope)
        logits = np.asarray(run(params, {"tokens": texts}, make_config(position=alike))[0])
        likeliest[name] = np.zeros((2, new), int)
        for row, length in enumerate(lengths):
            for i in range(new):
                end = length + i
                penalised = logits[row, end - 1].copy()
                held = np.unique(texts[row, :end])
                penalised[held] = np.where(penalised[held] > 0, penalised[held] / 1.3, penalised[held] * 1.3)
                likeliest[name][row, i] = penalised.argmax()
    short = 6 + np.arange(new) <= 8  # by the longest text of the batch
    np.testing.assert_array_equal(made, np.where(short, likeliest["short"], likeliest["long"]))
    assert (likeliest["short"] != likeliest["long"])[:, ~short].any()
    chunked = generate(params, batch, config, max_new_tokens=new, repetition_penalty=1.3, prefill_chunk=3)
    np.testing.assert_array_equal(chunked, made)
