"""Sparsity at inference against plain loops of numpy, one query and one head at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import (
    H2O,
    ExactBlocks,
    ExactTokens,
    InfLLM,
    ModelConfig,
    NSAConfig,
    Probe,
    Quest,
    SlidingAttentionConfig,
    forward,
    init_cache,
    selectors,
)
from jaxlab.models.selectors import block_bounds, bound_scores
from jaxlab.models.sparse_inference import sparse_attention
from tests.models.tiny import draw_params, draw_tokens, make_config

BUDGET = {"block_size": 4, "num_blocks": 4}
SMALL = (
    ExactTokens(**BUDGET),
    ExactBlocks(**BUDGET),
    Quest(**BUDGET),
    InfLLM(**BUDGET, representatives=2),
    H2O(**BUDGET),
)
BY_METHOD = pytest.mark.parametrize("sparsity", SMALL, ids=lambda sparsity: sparsity.kind)
LENGTH, HEADS, KV_HEADS, DIM, VALUE_DIM, SCALE = 27, 4, 2, 4, 3, 0.4
SHARE = HEADS // KV_HEADS
run = jax.jit(sparse_attention, static_argnames=("sparsity", "scale"))


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, LENGTH, HEADS, DIM), (2, LENGTH, KV_HEADS, DIM), (2, LENGTH, KV_HEADS, VALUE_DIM))
    return [2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def best(scores, t, c):
    """Tokens up to t of the forced blocks and of those with the highest scores."""
    own = t // c.block_size
    order = sorted(
        range(own + 1), key=lambda j: (not (j < c.num_init or j > own - c.num_local), -scores[j], j)
    )
    return [s for s in range(t + 1) if s // c.block_size in order[: c.num_blocks]]


def tokens_of(j, c, end=LENGTH):
    return range(j * c.block_size, min((j + 1) * c.block_size, end))


def reads(method, q, k, t, head, c):
    """The tokens that query t of a head reads, in float64, from q [T, H, D] and k [T, Hkv, D]."""
    keys, blocks = k[:, head // SHARE], range(t // c.block_size + 1)
    if method == "exact_tokens":
        return sorted(range(t + 1), key=lambda s: -(q[t, head] @ keys[s]))[: c.budget]
    if method == "exact_blocks":
        weights = softmax(SCALE * keys[: t + 1] @ q[t, head])
        return best([sum(weights[s] for s in tokens_of(j, c, t + 1)) for j in blocks], t, c)
    if method == "quest":
        bounds = []
        for j in blocks:
            part = keys[list(tokens_of(j, c))]
            bounds.append(sum(max(x * y.min(), x * y.max()) for x, y in zip(q[t, head], part.T, strict=True)))
        return best(bounds, t, c)
    similarity = []
    for j in blocks:
        total = 0.0
        for h in range(HEADS):
            ranked = sorted(tokens_of(j, c), key=lambda s, h=h: -rating(q, k, s, h, c))
            total += sum(q[t, h] @ k[s, h // SHARE] for s in ranked[: c.representatives])
        similarity.append(total)
    return best(similarity, t, c)


def rating(q, k, s, head, c):
    """InfLLM's rating of token s, up to a factor: its scores with the queries that follow, together."""
    following = q[s + 1 : s + 1 + (c.num_local - 1) * c.block_size, head]
    return (following @ k[s, head // SHARE]).sum()


def expected(method, q, k, v, c):
    out = np.zeros((LENGTH, HEADS, VALUE_DIM))
    for t in range(LENGTH):
        for head in range(HEADS):
            read = reads(method, q, k, t, head, c)
            weights = softmax(SCALE * k[read, head // SHARE] @ q[t, head])
            out[t, head] = weights @ v[read, head // SHARE]
    return out


def expected_h2o(q, k, v, c):
    out, recent = np.zeros((LENGTH, HEADS, VALUE_DIM)), c.num_local * c.block_size
    for group in range(KV_HEADS):
        kept, attention = [], dict.fromkeys(range(LENGTH), 0.0)
        for t in range(LENGTH):
            if len(kept) == c.budget:
                kept.remove(min((s for s in kept if s <= t - recent), key=lambda s: attention[s]))
            kept.append(t)
            for head in range(group * SHARE, (group + 1) * SHARE):
                weights = softmax(SCALE * k[kept, group] @ q[t, head])
                out[t, head] = weights @ v[kept, group]
                for s, weight in zip(kept, weights, strict=True):
                    attention[s] += weight
    return out


@BY_METHOD
def test_plain_loops_give_the_same(sparsity, monkeypatch):
    monkeypatch.setattr(selectors, "CHUNK_ELEMENTS", 5 * 2 * HEADS * LENGTH)  # the last chunk is short
    q, k, v = draw()
    method = sparsity.kind
    found = np.asarray(run(q, k, v, sparsity, scale=SCALE))
    dense = dataclasses.replace(sparsity, num_blocks=7)
    assert dense.budget >= LENGTH
    everything = np.asarray(run(q, k, v, dense, scale=SCALE))
    for row in range(2):
        exact = [x[row].astype(np.float64) for x in (q, k, v)]
        oracle = expected_h2o(*exact, sparsity) if method == "h2o" else expected(method, *exact, sparsity)
        np.testing.assert_allclose(found[row], oracle, atol=2e-5)
        # A budget of the whole text is plain attention, and this one is not.
        np.testing.assert_allclose(everything[row], expected("exact_tokens", *exact, dense), atol=2e-5)
    assert np.abs(found - everything)[:, : sparsity.budget].max() < 1e-5
    assert np.abs(found - everything)[:, sparsity.budget :].max() > 0.05


@BY_METHOD
def test_nothing_reads_the_future(sparsity):
    q, k, v = draw()
    before = np.asarray(run(q, k, v, sparsity, scale=SCALE))
    for at in (11, 18, 25):
        changed = [
            np.concatenate([x[:, :at], 9 * y[:, at:]], axis=1)
            for x, y in zip((q, k, v), draw(1), strict=True)
        ]
        after = np.asarray(run(*changed, sparsity, scale=SCALE))
        np.testing.assert_allclose(after[:, :at], before[:, :at], atol=1e-5)
        assert np.abs(after[:, at:] - before[:, at:]).max() > 0.1


def test_bounds_hold_for_every_key():
    q, k, _ = draw()
    scores = bound_scores(
        jnp.asarray(q.reshape(2, LENGTH, KV_HEADS, SHARE, DIM)), block_bounds(jnp.asarray(k), 4)
    )
    assert scores.shape == (2, KV_HEADS, SHARE, LENGTH, 7)
    for s in range(LENGTH):
        products = np.einsum("bthgd,bhd->bhgt", q.reshape(2, LENGTH, KV_HEADS, SHARE, DIM), k[:, s])
        assert (products <= np.asarray(scores[..., s // 4]) + 1e-5).all()
    # The last block has three tokens; padding would have let zeros in.
    last = np.asarray(block_bounds(jnp.asarray(k), 4).low[:, -1])
    np.testing.assert_array_equal(last, k[:, 24:].min(axis=1))


def test_a_dense_model_takes_it_as_it_is():
    config = make_config(num_layers=1)
    params, tokens = draw_params(config), draw_tokens(config, 2, 18)
    sparse = lambda **sizes: dataclasses.replace(config, sparsity=Quest(block_size=4, num_local=1, **sizes))
    run_model = jax.jit(forward, static_argnames="config")
    logits = lambda c: np.asarray(run_model(params, {"tokens": tokens}, c)[0])
    dense = logits(config)
    np.testing.assert_allclose(logits(sparse(num_blocks=5)), dense, atol=1e-5)
    found = logits(sparse(num_blocks=2))
    np.testing.assert_allclose(found[:, :8], dense[:, :8], atol=1e-5)
    assert np.abs(found[:, 12:] - dense[:, 12:]).max() > 1e-3
    for extra, options in (
        ({}, {"cache": init_cache(config, 2, 20)}),
        ({}, {"probe": Probe()}),
        ({"segment_ids": jnp.ones((2, 18), jnp.int32)}, {}),
    ):
        with pytest.raises(ValueError, match="sparsity reads one whole text a row"):
            forward(params, {"tokens": tokens, **extra}, sparse(num_blocks=2), **options)


@pytest.mark.parametrize(
    ("make", "values", "key"),
    [
        (ExactTokens, {"block_size": 0}, "block_size"),
        (Quest, {"num_local": 0}, "num_local"),
        (ExactBlocks, {"num_init": -1}, "num_init"),
        (Quest, {"num_blocks": 2}, "num_blocks"),
        (InfLLM, {"num_local": 1}, "num_local"),
        (InfLLM, {"representatives": 0}, "representatives"),
        (H2O, {"num_local": 17}, "num_local"),
    ],
)
def test_impossible_settings_are_refused(make, values, key):
    with pytest.raises(ConfigError) as caught:
        make(**values)
    assert caught.value.key == key


@pytest.mark.parametrize(
    "changes",
    [{"attention": NSAConfig()}, {"attention": SlidingAttentionConfig()}, {"attention_softcap": 5.0}],
)
def test_models_without_full_attention_are_refused(changes):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(sparsity=H2O(), **changes)
    assert caught.value.key == "sparsity"
