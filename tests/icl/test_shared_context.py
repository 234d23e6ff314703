"""Demonstrations that prompts have in common, read once; prompts whose last token alone is computed."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlab.icl.compression import continued_logits, last_logits, read_shared
from jaxlab.icl.reweighting import answer, ask, reweighted_logits
from jaxlab.models import Probe, forward, init_cache
from tests.models.tiny import draw_params, draw_tokens, make_config

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
LABELS = 3
STARTS = np.array([9, 9], np.int32)
POSITIONS = np.array([15, 12], np.int32)

CONFIGS = {
    "grouped": make_config(num_heads=4, num_kv_heads=2),
    "sinks": make_config(num_heads=4, num_kv_heads=2, attention_sinks=True),
}

pytestmark = pytest.mark.usefixtures("quick")


def prompts(config):
    """Two with the same first nine tokens; (tokens, label words)."""
    tokens = np.array(draw_tokens(config, 2, 16), np.int32)
    tokens[1, : STARTS[0]] = tokens[0, : STARTS[0]]
    words = np.full(tokens.shape, -1, np.int32)
    words[:, [2, 5, 8]] = [0, 2, 1]
    return tokens, words


def whole(params, tokens, words, beta, config):
    """Every token of every prompt, by the attention that flows are streamed from."""
    at_answer = np.arange(tokens.shape[1])[None] == POSITIONS[:, None]
    factors = np.ones((config.num_layers, len(tokens), config.num_heads, LABELS + 1, LABELS + 1), np.float32)
    factors[..., LABELS, :LABELS] = np.exp(beta).swapaxes(0, 1)
    probe = Probe(factors=factors, classes=np.where(at_answer, LABELS, words).astype(np.int32))
    logits = forward(params, {"tokens": tokens}, config, probe=probe).logits
    return np.asarray(logits)[np.arange(len(tokens)), POSITIONS]


@pytest.fixture(params=["grouped", pytest.param("sinks", marks=pytest.mark.slow)], scope="module")
def case(request):
    config = CONFIGS[request.param]
    params = draw_params(config)
    beta = np.random.default_rng(1).normal(size=(2, config.num_layers, config.num_heads, LABELS))
    return config, params, *prompts(config), beta.astype(np.float32)


def test_the_last_token_alone_is_the_whole_prompt(case):
    config, params, tokens, words, beta = case
    expected = whole(params, tokens, words, beta, config)
    for starts in (None, STARTS):
        found = answer(params, ask(params, tokens, POSITIONS, words, config, starts), beta, config)
        np.testing.assert_allclose(found, expected, **CLOSE)
    plain = np.asarray(last_logits(params, tokens, POSITIONS, config))
    assert np.abs(plain - expected).max() > 1e-3
    same = reweighted_logits(
        params, {"tokens": tokens}, config, POSITIONS, words, np.zeros_like(beta[0]), STARTS
    )
    np.testing.assert_allclose(same, plain, **CLOSE)


def test_gradients_of_factors_are_those_of_the_whole_prompt(case):
    config, params, tokens, words, beta = case
    direction = np.random.default_rng(2).normal(size=(2, config.vocab_size)).astype(np.float32)
    asked = ask(params, tokens, POSITIONS, words, config, STARTS)
    slope = jax.grad(lambda beta: (answer(params, asked, beta, config) * direction).sum())(beta)
    step, along = 1e-2, np.sign(slope)
    ends = [(whole(params, tokens, words, beta + s * along, config) * direction).sum() for s in (-step, step)]
    assert np.isclose((ends[1] - ends[0]) / (2 * step), np.abs(slope).sum(), rtol=2e-3)


def test_shared_demonstrations_are_read_once(case, monkeypatch):
    config, params, tokens, _, _ = case
    shared = read_shared(params, tokens, STARTS, POSITIONS, config)
    assert shared is not None
    np.testing.assert_allclose(
        continued_logits(params, *shared, config), last_logits(params, tokens, POSITIONS, config), **CLOSE
    )
    tokens = tokens.copy()
    tokens[1, 3] = (tokens[1, 3] + 1) % config.vocab_size
    assert read_shared(params, tokens, STARTS, POSITIONS, config) is None
    assert read_shared(params, tokens, np.zeros_like(STARTS), POSITIONS, config) is None


def test_a_cache_takes_factors_alone():
    config = CONFIGS["grouped"]
    params = draw_params(config)
    tokens, words = prompts(config)
    cache = init_cache(config, *tokens.shape)
    factors = np.ones((config.num_layers, 2, config.num_heads, 2, 2), np.float32)
    probe = Probe(factors=factors, classes=words, slot_classes=words)
    forward(params, {"tokens": tokens}, config, cache=cache, probe=probe)
    blocked = np.zeros((config.num_layers, *tokens.shape), bool)
    for other in ({"slot_classes": None}, {"blocked": blocked}, {"factors": None}):
        with pytest.raises(ValueError, match="with a cache a probe has factors"):
            forward(
                params, {"tokens": tokens}, config, cache=cache, probe=dataclasses.replace(probe, **other)
            )
