"""The auxiliary selector: its loss by plain loops, and that it trains the scorer and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import bind, forward, init_cache, selectors
from jaxlab.models.selectors import AuxiliarySelector, auxiliary_loss
from tests.models.tiny import NSA, draw_params, draw_tokens, make_config

SIZES = dataclasses.replace(NSA, selector="auxiliary")
"""Blocks of four tokens, one first and one local one forced."""
BATCH, LENGTH, KV_HEADS, GROUPS, DIM = 2, 18, 2, 2, 3


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (BATCH, LENGTH, KV_HEADS, GROUPS, DIM),
        (BATCH, LENGTH, KV_HEADS, DIM),
        (BATCH, KV_HEADS, LENGTH, 5),
    )
    return [jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_the_loss_is_that_of_plain_loops(monkeypatch):
    monkeypatch.setattr(selectors, "CHUNK_ELEMENTS", 7 * BATCH * KV_HEADS * GROUPS * LENGTH)
    q, k, scores = draw()
    found = auxiliary_loss(scores, q, k, SIZES, scale=0.7)
    divergences = []
    for row in range(BATCH):
        for head in range(KV_HEADS):
            for t in range(LENGTH):
                free = range(1, t // 4)
                if not free:
                    continue
                target = np.zeros(len(free))
                for g in range(GROUPS):
                    weights = np.exp(
                        0.7 * np.asarray(k[row, : t + 1, head], np.float64) @ np.asarray(q[row, t, head, g])
                    )
                    target += [weights[4 * j : 4 * j + 4].sum() / weights.sum() for j in free]
                target /= target.sum()
                chances = np.exp(np.asarray(scores[row, head, t, 1 : t // 4], np.float64))
                divergences.append((target * np.log(target / (chances / chances.sum()))).sum())
    assert float(found) == pytest.approx(np.mean(divergences), rel=1e-4)
    assert float(found) > 0.1
    # With two blocks or fewer there is nothing to choose, and no NaN in the gradient.
    value, gradient = jax.value_and_grad(auxiliary_loss)(
        scores[:, :, :8, :2], q[:, :8], k[:, :8], SIZES, scale=1.0
    )
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_scores_that_know_the_attention_have_no_loss_and_learning_comes_closer():
    q, k, _ = draw()
    mass = jnp.sum(selectors.block_mass(selectors.causal_scores(q, k, jnp.arange(LENGTH), 0.7), 4), axis=2)
    loss = lambda s: auxiliary_loss(s, q, k, SIZES, scale=0.7)
    assert float(loss(jnp.log(mass + 1e-30))) == pytest.approx(0, abs=1e-5)
    # From embeddings a scorer of its own learns what it can.
    x = jnp.concatenate([q[..., 0, :], k], axis=-1).reshape(BATCH, LENGTH, -1)
    rng = np.random.default_rng(1)
    params = {
        name: jnp.asarray(0.1 * rng.standard_normal((x.shape[-1], KV_HEADS, 3)), jnp.float32)
        for name in ("query", "key")
    }
    config = make_config("nsa_auxiliary")
    step = jax.jit(jax.value_and_grad(lambda p: loss(bind(p, AuxiliarySelector, config)(x))))
    first, gradient = step(params)
    for _ in range(60):
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
        last, gradient = step(params)
    assert float(last) < 0.8 * float(first)


@pytest.mark.slow
def test_the_loss_trains_the_scorer_and_nothing_else():
    config = make_config("nsa_auxiliary", num_layers=1)
    params, batch = draw_params(config), {"tokens": draw_tokens(config, 2, 18)}

    def of_logits(params):
        return jnp.sum(jnp.sin(forward(params, batch, config).logits))

    def of_loss(params):
        return jnp.sum(forward(params, batch, config).selector_loss)

    for loss, of_scorer in ((of_logits, False), (of_loss, True)):
        tree = jax.jit(jax.grad(loss))(params)
        for path, gradient in jax.tree_util.tree_leaves_with_path(tree):
            mine = ("selector" in jax.tree_util.keystr(path)) == of_scorer
            assert bool(jnp.any(gradient != 0)) == mine, jax.tree_util.keystr(path)


def test_a_packed_text_has_the_loss_that_it_has_alone():
    """Two texts, the second from row 2 on, and padding: queries of the first have no choice."""
    q, k, _ = draw()
    config = make_config("nsa_auxiliary")
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((BATCH, LENGTH, config.width)), jnp.float32)
    size = (config.width, KV_HEADS, SIZES.selector_dim)
    scorer = {name: jnp.asarray(rng.standard_normal(size), jnp.float32) for name in ("query", "key")}

    def of(scorer, part, segments=None):
        scores = bind(scorer, AuxiliarySelector, config)(x[:, part], segments)
        return auxiliary_loss(scores, q[:, part], k[:, part], SIZES, scale=0.7, segment_ids=segments)

    segments = jnp.broadcast_to(jnp.asarray([4] * 2 + [2] * 15 + [0])[None], (BATCH, LENGTH))
    packed, gradient = jax.value_and_grad(of)(scorer, slice(None), segments)
    alone, expected = jax.value_and_grad(of)(scorer, slice(2, 17))
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)
    assert float(alone) > 0.01
    for name in scorer:
        np.testing.assert_allclose(gradient[name], expected[name], atol=1e-5)


def test_what_the_scorer_cannot_read_is_refused():
    config = make_config("nsa_auxiliary")
    with pytest.raises(ValueError, match="the auxiliary selector reads one whole text a row"):
        forward(
            draw_params(config), {"tokens": draw_tokens(config, 1, 4)}, config, cache=init_cache(config, 1, 4)
        )
