"""NSA's cache within a model: prompts in chunks of any size, rows of different lengths, pace and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import NSAConfig, RopeConfig, forward, generate, init_cache
from jaxlab.models.generation import decode_step
from tests.models.tiny import draw_params, draw_tokens, make_config

CONFIG = make_config("nsa", num_layers=2)
LENGTHS = np.array([21, 10, 3])
"""Blocks have 4 tokens, one every 2, the window 3: the last row never completes a block."""
PADDING = CONFIG.vocab_size - 1
"""A token that stands nowhere else."""
run = jax.jit(forward, static_argnames="config")


@functools.cache
def whole():
    params = draw_params(CONFIG)
    tokens = np.asarray(draw_tokens(CONFIG, 3, 21)) % PADDING
    return params, tokens, np.asarray(run(params, {"tokens": tokens}, CONFIG)[0])


# Three programs read chunks of five sizes; the shorter ones are padded.
@pytest.mark.parametrize(
    ("chunk", "size"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 5), (5, 5), (16, 21), (21, 21)]
)
def test_chunks_of_any_size_give_the_logits_of_the_full_forward(chunk, size):
    params, tokens, expected = whole()
    table = params["embedding"]["table"].at[PADDING].set(jnp.nan)
    params = params | {"embedding": {"table": table}}
    cache = init_cache(CONFIG, 3, 21)
    at = np.zeros(3, int)
    while (at < LENGTHS).any():
        count = np.minimum(chunk, LENGTHS - at)
        segment_ids = (np.arange(size)[None] < count[:, None]).astype(np.int32)
        piece = np.full((3, size), PADDING, np.int32)
        for row in range(3):
            piece[row, : count[row]] = tokens[row, at[row] : at[row] + count[row]]
        logits, intermediates = run(
            params, {"tokens": piece, "segment_ids": segment_ids}, CONFIG, cache=cache
        )
        cache = intermediates["cache"]
        for row in range(3):  # the head is tied: the logit of padding is NaN
            found = np.asarray(logits)[row, : count[row], :PADDING]
            wanted = expected[row, at[row] : at[row] + count[row], :PADDING]
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        at += count
    np.testing.assert_array_equal(cache.length, LENGTHS)


def test_greedy_tokens_after_prompts_in_chunks_are_those_of_a_full_forward():
    params, tokens, _ = whole()
    lengths = np.array([11, 6, 2])
    segment_ids = (np.arange(11)[None] < lengths[:, None]).astype(np.int32)
    batch = {"tokens": jnp.asarray(tokens[:, :11] * segment_ids), "segment_ids": jnp.asarray(segment_ids)}
    made = generate(params, batch, CONFIG, max_new_tokens=8, prefill_chunk=3)
    sequence = np.zeros((3, 21), np.int32)
    for row, length in enumerate(lengths):
        sequence[row, : length + 8] = [*tokens[row, :length], *made[row]]
    likeliest = np.asarray(run(params, {"tokens": sequence}, CONFIG)[0]).argmax(axis=-1)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(made[row], likeliest[row, length - 1 : length + 7])


def test_a_step_copies_no_layer_of_the_cache():
    """Temporary memory grows by the compressed blocks at most, a thirty-second part of the tokens here."""
    config = make_config("nsa", attention=NSAConfig(block_len=32, stride=32, num_blocks=3, compress_width=4))
    params = draw_params(config)

    def temporary(length: int) -> int:
        arguments = params, {"tokens": jnp.zeros((1, 1), jnp.int32)}, init_cache(config, 1, length)
        compiled = decode_step.lower(*arguments, jax.random.key(0), {}, None, config).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_layer = 8192 * config.kv_heads * (config.key_dim + config.value_dim) * 4
    assert temporary(2 * 8192) - temporary(8192) < one_layer / 4


def test_errors():
    params, tokens, _ = whole()
    batch = {"tokens": jnp.asarray(tokens[:, :4])}
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, is 0"):
        generate(params, batch, CONFIG, max_new_tokens=1, prefill_chunk=0)
    with pytest.raises(ValueError, match="prompts with positions cannot be read in chunks"):
        generate(params, batch | {"positions": tokens[:, :4]}, CONFIG, max_new_tokens=1, prefill_chunk=2)
    with pytest.raises(ValueError, match="counts positions itself"):
        forward(params, batch | {"positions": tokens[:, :4]}, CONFIG, cache=init_cache(CONFIG, 3, 8))
    with pytest.raises(ValueError, match="no cache for positions of several coordinates"):
        init_cache(make_config("nsa", position=RopeConfig(sections=(1, 1))), 1, 8)


@pytest.mark.slow
def test_blocks_of_128_of_which_16_are_read():
    """As MiniMax' sparse attention has them, on a text of which some blocks are left out."""
    nsa = NSAConfig(block_size=128, num_blocks=16, num_local=1, window=128, compress_kind="mean")
    config = make_config("nsa", attention=nsa, num_layers=1, max_length=2400)
    params, tokens = draw_params(config), draw_tokens(config, 1, 2390)
    whole = run(params, {"tokens": tokens}, config)
    chosen = np.asarray(whole.chosen_blocks)[0, 0, :, -1]
    assert chosen.shape == (2, 16)
    assert (chosen[:, -1] == 18).all()
    assert set(range(19)) - set(chosen[0].tolist())  # some were left out
    cache, found = init_cache(config, 1, 2400), []
    for part in (slice(0, 1200), slice(1200, 2389), slice(2389, 2390)):
        output = run(params, {"tokens": tokens[:, part]}, config, cache=cache)
        cache = output.cache
        found.append(output.logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole.logits, atol=2e-5)
