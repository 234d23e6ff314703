"""Probes of whole models: weights read from one token, factors on them, logits of some positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import (
    ModelConfig,
    NSAConfig,
    Patch,
    Probe,
    SlidingAttentionConfig,
    activations,
    block,
    forward,
    init_cache,
    init_params,
    prefill,
)

MODEL = ModelConfig(
    vocab_size=19,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=24,
    max_length=16,
    initializer_range=0.4,
    attention=SlidingAttentionConfig(window=5, pattern=("full", "sliding")),
    attention_softcap=2.0,
)
TOKENS, BATCH = 12, 2


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (BATCH, TOKENS)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": np.array([[1] * 12, [1] * 3 + [2] * 7 + [0] * 2], np.int32)}


def test_weights_read_are_those_of_the_pattern(params, batch):
    query, at = np.array([11, 9], np.int32), np.array([[0, 4, 9], [1, 4, -1]], np.int32)
    out = jax.jit(forward, static_argnums=2)(params, batch, MODEL, probe=Probe(read_from=query, read_at=at))
    pattern = np.asarray(activations(params, batch, MODEL, "attention_pattern")["attention_pattern"])
    for row in range(BATCH):
        expected = np.where(at[row] >= 0, pattern[:, row, :, query[row], at[row]].transpose(1, 2, 0), 0.0)
        np.testing.assert_allclose(out.weights_read[:, row], expected, rtol=1e-4, atol=1e-6)
    assert len(set(MODEL.kinds)) == 2
    assert np.asarray(out.weights_read)[0, 0, :, 1].min() > 0  # a full layer sees beyond the window
    np.testing.assert_allclose(out.logits, forward(params, batch, MODEL).logits, rtol=1e-4, atol=1e-5)


def test_factors_of_layers_are_a_change_of_the_pattern(params, batch):
    classes = np.full((BATCH, TOKENS), -1, np.int32)
    classes[:, [3, 5]], classes[0, 11], classes[1, 9] = 0, 1, 1
    factors = np.ones((MODEL.num_layers, BATCH, 4, 2, 2), np.float32)
    factors[:, :, :, 1, 0] = np.random.default_rng(1).uniform(0.1, 4.0, (MODEL.num_layers, BATCH, 4))
    probed = lambda f: forward(params, batch, MODEL, probe=Probe(factors=f, classes=classes)).logits
    x = activations(params, batch, MODEL, "attention_pattern", layers=2)["attention_pattern"]
    alone = np.ones_like(factors)
    alone[2] = factors[2]
    times = np.ones(x.shape, np.float32)
    for row, query in ((0, 11), (1, 9)):
        times[row, :, query][:, [3, 5]] = factors[2, row, :, 1, 0][:, None]
    patch = Patch("attention_pattern", layers=2, value=x * times)
    expected = forward(params, batch, MODEL, patches=(patch,)).logits
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(probed(alone)[real], expected[real], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(probed(factors) - probed(np.ones_like(factors)))[0, 11]).max() > 1e-3
    at_query = jax.jit(jax.grad(lambda f: jnp.sum(probed(f)[0, 11, :5])))(factors)
    assert np.all(np.asarray(at_query)[[0, 2], 0, :, 1, 0] != 0.0)  # layer 1 does not see that far
    assert np.all(np.asarray(at_query)[:, 1] == 0.0)  # rows of the batch do not mix


def test_logits_of_some_positions(params, batch):
    positions = np.array([[3, 11], [9, 0]], np.int32)
    whole, some = forward(params, batch, MODEL), forward(params, batch, MODEL, logit_positions=positions)
    for name in ("logits", "hidden"):
        expected = np.take_along_axis(np.asarray(getattr(whole, name)), positions[:, :, None], 1)
        np.testing.assert_allclose(getattr(some, name), expected, rtol=1e-5, atol=1e-5)
    run = jax.jit(forward, static_argnums=2).lower(params, batch, MODEL, logit_positions=positions)
    assert f"f32[{BATCH},{TOKENS},{MODEL.vocab_size}]" not in run.compile().as_text()


@pytest.mark.parametrize("more", [{}, {"tie_embeddings": False, "head_bias": True, "logit_softcap": 3.0}])
def test_logits_of_some_words(batch, more):
    """Those of the vocabulary; no array of its size is computed, nor has it a gradient."""
    config = dataclasses.replace(MODEL, **more)
    params = init_params(config, jax.random.key(3))
    if "head" in params:
        params["head"]["bias"] = jnp.arange(19.0)
    at, words = np.array([[3, 11], [9, 0]], np.int32), np.array([[4, 18, 4], [0, 1, 7]], np.int32)
    run = lambda **more: forward(params, batch, config, logit_positions=at, **more).logits
    expected = np.take_along_axis(np.asarray(run()), words[:, None], 2)
    np.testing.assert_allclose(run(logit_tokens=words), expected, rtol=1e-5, atol=1e-5)
    text = jax.jit(lambda p: forward(p, batch, config, logit_positions=at, logit_tokens=words).logits)
    assert f"f32[{BATCH},2,19]" not in text.lower(params).compile().as_text()


def test_reading_prompts_builds_one_row_of_logits(params):
    batch = {"tokens": jnp.zeros((BATCH, TOKENS), jnp.int32), "segment_ids": jnp.ones((BATCH, TOKENS), int)}
    cache, first = init_cache(MODEL, BATCH, TOKENS), jnp.zeros((BATCH, 19))
    text = prefill.lower(params, batch, cache, first, MODEL).compile().as_text()
    assert f"[{BATCH},{TOKENS},19]" not in text
    assert f"[{BATCH * TOKENS},19]" not in text


def test_flows_go_through_the_mlp_stretch_by_stretch(params, batch, monkeypatch):
    tap = jnp.zeros((3, BATCH, 2, 2), jnp.float32)
    classes = np.arange(TOKENS)[None] % 2 + np.zeros((BATCH, 1), int)
    config = dataclasses.replace(MODEL, remat="layer")
    loss = lambda tap: jnp.sum(forward(params, batch, config, probe=Probe(tap, classes=classes)).logits ** 2)
    whole = jax.jit(jax.grad(loss))(tap)
    assert f"f32[{BATCH},{TOKENS},24]" in str(jax.make_jaxpr(jax.grad(loss))(tap))
    monkeypatch.setattr(block, "MLP_BYTES", BATCH * 4 * 24 * 4)
    jax.clear_caches()
    assert f"f32[{BATCH},{TOKENS},24]" not in str(jax.make_jaxpr(jax.grad(loss))(tap))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(tap), whole, rtol=1e-5, atol=1e-6)


def test_mistakes_are_told_in_one_line(params, batch):
    query, at = np.zeros(BATCH, np.int32), np.zeros((BATCH, 1), np.int32)
    run = lambda config=MODEL, **more: forward(params, batch, config, **more)
    with pytest.raises(ValueError, match="read_from and read_at go together"):
        run(probe=Probe(read_from=query))
    with pytest.raises(ValueError, match="begins with 3, not"):
        run(probe=Probe(blocked=np.zeros((2, BATCH, TOKENS), bool)))
    with pytest.raises(ValueError, match="without blocking"):
        run(probe=Probe(blocked=np.zeros((3, BATCH, TOKENS), bool), read_from=query, read_at=at))
    nsa = ModelConfig(vocab_size=19, width=16, num_layers=3, num_heads=4, attention=NSAConfig())
    with pytest.raises(ValueError, match="the model's attention is nsa"):
        run(nsa, probe=Probe(read_from=query, read_at=at))
    with pytest.raises(ValueError, match="patch of logits is of all tokens"):
        run(logit_positions=at, patches=(Patch("logits", value=np.zeros(19, np.float32)),))
