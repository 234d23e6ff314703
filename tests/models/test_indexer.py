"""The indexer: its loss by plain loops, what it trains, its warm-up, its cache, and a dense model's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import NSAConfig, forward, init_cache, selectors
from jaxlab.models.indexer import IndexQueries, block_scores, indexer_loss
from jaxlab.retrofit import measure_retrofit, retrofit
from kernels_pallas.nsa import select_blocks_by_importance
from tests.models.tiny import NSA, draw_params, draw_tokens, make_config

BATCH, LENGTH, KV_HEADS, GROUPS, DIM, HEADS, INDEX_DIM, SIZE = 2, 19, 2, 2, 3, 3, 5, 4
TEXTS = np.array([[1] * 7 + [2] * 10 + [0] * 2, [5] * 19])
run = jax.jit(forward, static_argnames="config")


def draw(seed=0, *, weighted=True):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(1.5 * rng.standard_normal(shape), jnp.float32)
    heads = normal(BATCH, LENGTH, KV_HEADS, HEADS if weighted else 1, INDEX_DIM)
    weights = normal(BATCH, LENGTH, KV_HEADS, HEADS) if weighted else None
    return (
        IndexQueries(heads, weights),
        normal(BATCH, LENGTH, 1, INDEX_DIM),
        normal(BATCH, LENGTH, KV_HEADS, GROUPS, DIM),
        normal(BATCH, LENGTH, KV_HEADS, DIM),
    )


def choose(queries, keys, segments):
    rows = jnp.broadcast_to(jnp.arange(LENGTH)[None], (BATCH, LENGTH))
    importance = block_scores(queries, keys, rows, SIZE, segments)
    sizes = {"block_size": SIZE, "num_blocks": 3, "num_init": 0, "num_local": 1}
    return select_blocks_by_importance(importance, **sizes, segment_ids=segments)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def by_loops(queries, keys, q, k, chosen, segments, scale):
    """In float64."""
    heads, weights, keys, q, k = (
        None if x is None else np.asarray(x, np.float64) for x in (*queries, keys, q, k)
    )
    found = []
    for b in range(BATCH):
        for t in range(LENGTH):
            if segments[b, t] == 0:
                continue
            start = int(np.flatnonzero(segments[b] == segments[b, t])[0])
            for h in range(KV_HEADS):
                tokens = [
                    s
                    for s in range(start, t + 1)
                    if chosen is None or (s - start) // SIZE in np.asarray(chosen)[b, h, t].tolist()
                ]
                scores = []
                for s in tokens:
                    products = heads[b, t, h] @ keys[b, s, 0] / np.sqrt(INDEX_DIM)
                    if weights is not None:
                        products = np.maximum(products, 0) * weights[b, t, h] / np.sqrt(HEADS)
                    scores.append(products.sum())
                attention = [softmax(scale * k[b, tokens, h] @ q[b, t, h, g]) for g in range(GROUPS)]
                target, chances = np.mean(attention, axis=0), softmax(np.array(scores))
                found.append((target * np.log(target / chances)).sum())
    return np.mean(found)


@pytest.mark.parametrize(
    ("packed", "stage", "weighted"),
    [
        (True, "sparse", True),
        (False, "warm_up", False),
        pytest.param(False, "sparse", False, marks=pytest.mark.slow),
        pytest.param(True, "warm_up", True, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_that_of_plain_loops(monkeypatch, packed, stage, weighted):
    monkeypatch.setattr(selectors, "CHUNK_ELEMENTS", 7 * BATCH * KV_HEADS * GROUPS * LENGTH)
    queries, keys, q, k = draw(weighted=weighted)
    segments = jnp.asarray(TEXTS, jnp.int32) if packed else None
    chosen = None if stage == "warm_up" else choose(queries, keys, segments)
    loss = lambda keys: indexer_loss(queries, keys, q, k, chosen, size=SIZE, scale=0.7, segment_ids=segments)
    expected = by_loops(queries, keys, q, k, chosen, TEXTS if packed else np.ones_like(TEXTS), 0.7)
    assert float(loss(keys)) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    # The gradient, against a difference of losses.
    direction = jax.random.normal(jax.random.key(1), keys.shape)
    gradient = float(jnp.sum(jax.grad(loss)(keys) * direction))
    step = 1e-3  # a wider one crosses kinks
    difference = float(loss(keys + step * direction) - loss(keys - step * direction)) / (2 * step)
    assert gradient == pytest.approx(difference, rel=2e-2)
    assert abs(gradient) > 1e-3


def test_a_block_is_worth_its_best_token_and_the_future_is_not_seen():
    queries, keys, *_ = draw(weighted=False)
    keys = keys.at[:, 10:].set(jnp.nan)
    rows = jnp.broadcast_to(jnp.arange(LENGTH)[None], (BATCH, LENGTH))
    found = np.asarray(block_scores(queries, keys, rows, SIZE))
    for t in range(10):
        for j in range(5):
            tokens = range(4 * j, min(4 * j + 4, t + 1))
            scores = [float(queries.heads[1, t, 0, 0] @ keys[1, s, 0]) / np.sqrt(INDEX_DIM) for s in tokens]
            assert found[1, 0, t, j] == pytest.approx(max(scores, default=-np.inf), rel=1e-5)
    chosen = choose(queries, keys, None)
    np.testing.assert_array_equal(
        chosen[:, :, :10], choose(queries, keys.at[:, 10:].set(7.0), None)[:, :, :10]
    )


@pytest.mark.slow
def test_the_loss_trains_the_indexer_and_nothing_else():
    config = make_config("nsa_indexer", num_layers=1)
    params, batch = draw_params(config), {"tokens": draw_tokens(config, 2, 18)}

    def of_logits(params):
        return jnp.sum(jnp.sin(forward(params, batch, config).logits))

    def of_loss(params):
        return jnp.sum(forward(params, batch, config).selector_loss)

    for loss, of_indexer in ((of_logits, False), (of_loss, True)):
        tree = jax.jit(jax.grad(loss))(params)
        for path, gradient in jax.tree_util.tree_leaves_with_path(tree):
            mine = ("indexer" in jax.tree_util.keystr(path)) == of_indexer
            assert bool(jnp.any(gradient != 0)) == mine, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["nsa_indexer", "nsa_dot"])
def test_a_cache_gives_the_logits_of_the_whole_text(variant):
    config = make_config(variant, num_layers=1)
    params, tokens = draw_params(config), draw_tokens(config, 2, 21)
    whole = run(params, {"tokens": tokens}, config)
    assert (np.asarray(whole.chosen_blocks)[..., -1, :] >= 0).all()  # of six blocks three
    cache, found, chosen = init_cache(config, 2, 21), [], []
    for part in (slice(0, 20), slice(20, 21)):  # of which the last is one token alone
        output = run(params, {"tokens": tokens[:, part]}, config, cache=cache)
        cache = output.cache
        found.append(output.logits)
        chosen.append(output.chosen_blocks)
    np.testing.assert_array_equal(np.concatenate(chosen, axis=3), whole.chosen_blocks)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole.logits, atol=2e-5)


def warmed_up():
    """A dense model's parameters, tokens, and the model of one branch without gates that is made of it."""
    dense = make_config(attention_bias=True, num_layers=1)
    sizes = dict(num_init=0, compress_kind="mean", branches=("selection",), shared_kv=True, gated=False)
    nsa = dataclasses.replace(NSA, selector="indexer", selector_stage="warm_up", **sizes)
    params, tokens = draw_params(dense), draw_tokens(dense, 3, 22)
    return params, tokens, retrofit(params, dense, nsa)


def test_a_dense_model_is_kept_in_the_warm_up():
    """The logits are the dense ones while all blocks are read."""
    params, tokens, (changed, config) = warmed_up()
    dense = make_config(attention_bias=True, num_layers=1)
    found, expected = run(changed, {"tokens": tokens}, config), run(params, {"tokens": tokens}, dense)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)


@pytest.mark.slow
def test_the_indexer_of_a_dense_model_learns_its_attention_and_nothing_else_moves():
    _, tokens, (changed, config) = warmed_up()
    dense, before_training = make_config(attention_bias=True, num_layers=1), changed
    sparse = dataclasses.replace(config, attention=dataclasses.replace(config.nsa, selector_stage="sparse"))
    held = lambda params: np.mean(
        measure_retrofit(draw_params(dense), dense, params, sparse, {"tokens": tokens})["coverage"]["chosen"]
    )
    before, rate = held(changed), 0.1
    step = jax.jit(
        jax.value_and_grad(lambda p: jnp.mean(forward(p, {"tokens": tokens}, config).selector_loss))
    )
    first, gradient = step(changed)
    # Adam without its corrections, by hand.
    squares = jax.tree.map(jnp.square, gradient)
    for _ in range(40):
        changed = jax.tree.map(
            lambda p, g, s, rate=rate: p - rate * g / (jnp.sqrt(s) + 1e-6), changed, gradient, squares
        )
        last, gradient = step(changed)
        squares = jax.tree.map(lambda s, g: 0.9 * s + 0.1 * jnp.square(g), squares, gradient)
        rate *= 0.95
    assert float(last) < 0.7 * float(first)
    assert held(changed) > before + 0.02
    found, expected = (run(p, {"tokens": tokens}, config).logits for p in (changed, before_training))
    np.testing.assert_array_equal(found, expected)


def test_what_does_not_go_together_is_refused():
    for changes, key, words in (
        ({"selector_heads": 2, "selector_score": "dot"}, "selector_heads", "add up to one of one head"),
        ({"num_local": 0, "num_init": 1}, "num_local", "own block is always read"),
        ({"branches": ("compression", "window")}, "branches", "learns from the selection branch"),
        ({"selector": "min_max", "selector_stage": "warm_up"}, "selector_stage", "min_max has no warm-up"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            NSAConfig(**({"selector": "indexer"} | changes))
        assert error.value.key == key
    config = make_config("nsa_indexer")
    warm = dataclasses.replace(config, attention=dataclasses.replace(config.nsa, selector_stage="warm_up"))
    params, batch = draw_params(config), {"tokens": draw_tokens(config, 1, 4)}
    with pytest.raises(ValueError, match="a warm-up reads whole texts: no cache"):
        forward(params, batch, warm, cache=init_cache(warm, 1, 4))
