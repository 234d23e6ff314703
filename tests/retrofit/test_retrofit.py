"""A retrofitted model: what it keeps of the dense one, how near it begins, and what cannot be retrofitted."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import (
    AttentionContext,
    Block,
    MoEConfig,
    NSAConfig,
    RopeConfig,
    SlidingAttentionConfig,
    ViTConfig,
    abstract_params,
    bind,
    forward,
    rope_tables,
)
from jaxlab.retrofit.convert import GATE, retrofit, retrofitted
from kernels_pallas.nsa import compress_blocks
from tests.models.tiny import NSA, draw_params, draw_tokens, make_config

WIDE = dataclasses.replace(NSA, compress_width=15)  # 12 for the mean of 6 dimensions, and 3 to spare
COVERED = WIDE.num_blocks * WIDE.block_size
"""So many tokens are all chosen."""
BASE = make_config(num_layers=1, width=24, attention_bias=True)


@partial(jax.jit, static_argnums=(1, 2), static_argnames="gate")
def compiled(params, config, nsa, key=None, gate=GATE):
    return retrofit(params, config, nsa, key=key, gate=gate)[0]


def test_with_saturated_gates_a_covered_text_gives_the_dense_logits():
    config = make_config(
        attention_bias=True,
        norm="layer",
        qk_norm="width",
        tie_embeddings=False,
        attention_scale=0.7,
        position=RopeConfig(
            dim=2, interleaved=True, scaling="yarn", factor=2.0, original_length=8, layers=(True, False)
        ),
    )
    params, tokens = draw_params(config), draw_tokens(config, 2, COVERED)
    wide = dataclasses.replace(WIDE, gate_width=3)
    new = retrofitted(config, wide)
    changed = compiled(params, config, wide, gate=1e-9)
    run = jax.jit(lambda p, config: forward(p, {"tokens": tokens}, config)[0], static_argnums=1)
    dense, sparse = run(params, config), run(changed, new)
    assert np.abs(dense).max() > 1
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_with_open_gates_a_covered_text_stays_within_the_bound():
    config, params = BASE, draw_params(BASE)
    # The output projection lets every component of every head through by itself.
    params["layers"]["attention"]["output"] = jnp.eye(24).reshape(1, 4, 6, 24)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, COVERED, 24)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(COVERED, dtype=jnp.int32)[None], (2, COVERED))
    context = AttentionContext(positions, rotary=jax.jit(rope_tables, static_argnums=1)(positions, config)[0])

    @partial(jax.jit, static_argnums=1)
    def heads(p, config):
        block = bind(jax.tree.map(lambda leaf: leaf[0], p["layers"]), Block, config)
        return block.attention(x, context, kind=config.attention.kind).out

    dense = heads(params, config)
    values = np.einsum("btd,dhk->bthk", x, params["layers"]["attention"]["value"][0])
    values += np.asarray(params["layers"]["attention"]["value_bias"])[:, None]
    away = {}
    for gate in (GATE, GATE / 2):
        changed, new = compiled(params, config, WIDE, gate=gate), retrofitted(config, WIDE)
        away[gate] = heads(changed, new) - dense
        gates = jax.nn.sigmoid(changed["layers"]["attention"]["gate"]["bias"])
        np.testing.assert_allclose(gates, np.tile([gate, 1 - 2 * gate, gate], (1, 4, 1)), rtol=1e-5)
        assert 0.1 * gate < np.abs(away[gate]).max() <= 4 * gate * np.abs(values).max()
    # The distance is the gate times something of the dense model alone.
    np.testing.assert_allclose(away[GATE], 2 * away[GATE / 2], rtol=1e-3, atol=1e-5)


def test_compression_is_the_mean_and_its_spare_units_can_learn():
    config, params = BASE, draw_params(BASE)
    changed = compiled(params, config, WIDE, key=jax.random.key(3))["layers"]["attention"]
    x = np.random.default_rng(0).standard_normal((1, 9, 2, 6)).astype(np.float32) * 5
    phi = jax.tree.map(lambda leaf: leaf[0], changed["compress_value"])

    @jax.jit
    def summaries(phi):
        return compress_blocks(jnp.asarray(x), phi, block_len=4, stride=2)

    means = [x[:, start : start + 4].mean(axis=1) for start in (0, 2, 4)]
    np.testing.assert_allclose(summaries(phi), np.stack(means, axis=1), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda phi: jnp.sum(summaries(phi)))(phi)
    assert np.abs(gradient["output"][12:]).min() > 0
    other = compiled(params, config, WIDE, key=jax.random.key(4))["layers"]["attention"]
    drawn = [tree["compress_value"]["hidden"][..., 12:] for tree in (changed, other)]
    assert drawn[0].shape[-1] == 3
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1
    for name in ("key", "value", "key_bias", "value_bias"):
        for branch in range(3):
            np.testing.assert_array_equal(changed[name][:, branch], params["layers"]["attention"][name])


def test_all_but_attention_is_left_alone():
    config = make_config("vision", moe=MoEConfig(num_experts=2, width=5))
    params = draw_params(config)
    changed = compiled(params, config, WIDE)
    assert retrofitted(config, WIDE) == dataclasses.replace(config, attention=WIDE)
    attention = changed["layers"].pop("attention")
    before = params["layers"].pop("attention")
    jax.tree.map(np.testing.assert_array_equal, changed, params)
    for name in ("query", "output"):
        np.testing.assert_array_equal(attention[name], before[name])


@pytest.mark.parametrize(
    "changes", [{}, {"gate_width": 3}, {"selector": "indexer"}, {"selector": "auxiliary"}]
)
def test_its_parameters_are_those_of_its_config(changes):
    config = make_config(
        "other",
        moe=MoEConfig(num_experts=3, width=5, first_dense=1),
        num_layers=3,
        mlp="gated",
        mlp_bias=False,
    )
    nsa = dataclasses.replace(WIDE, **changes)
    changed = jax.eval_shape(lambda p: retrofit(p, config, nsa)[0], abstract_params(config))
    assert changed == abstract_params(retrofitted(config, nsa))


@pytest.mark.parametrize(
    ("changes", "nsa", "key"),
    [
        ({"attention_softcap": 5.0}, WIDE, "attention_softcap"),
        ({"attention": SlidingAttentionConfig()}, WIDE, "attention"),
        ({"attention": NSAConfig()}, WIDE, "attention"),
        ({"attention": SlidingAttentionConfig(pattern=("full", "sliding"))}, WIDE, "attention"),
        ({"position": RopeConfig(sections=(1, 1, 0))}, WIDE, "position.sections"),
        ({"position": RopeConfig(scaling="dynamic", factor=2.0)}, WIDE, "position.scaling"),
        ({}, dataclasses.replace(WIDE, compress_width=11), "attention.compress_width"),
        (
            {"vision": ViTConfig(together="images")},
            WIDE,
            "vision.together",
        ),
    ],
)
def test_what_nsa_lacks_is_named(changes, nsa, key):
    with pytest.raises(ConfigError) as raised:
        retrofitted(make_config(**changes), nsa)
    assert raised.value.key == key


def test_other_parameters_and_gates_are_refused():
    config = make_config()
    params = draw_params(config)
    with pytest.raises(ValueError, match=r"layers.attention.key is \(2, 12, 2, 4\), not \(2, 12, 4, 4\)"):
        retrofit(params, make_config(num_kv_heads=4), WIDE)
    with pytest.raises(ValueError, match="gate must lie between 0 and 0"):
        retrofit(params, config, WIDE, gate=0.5)
