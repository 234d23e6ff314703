"""Layers of several kinds, and how their scans are cut; positions stretched and of several coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import (
    AttentionContext,
    Block,
    ModelConfig,
    NSAConfig,
    RopeConfig,
    SlidingAttentionConfig,
    bind,
    bind_decoder,
    forward,
    rope_tables,
)
from jaxlab.models.rotary import rotary_table, rotate
from jaxlab.models.stack import Kind, Run, _runs
from tests.models.tiny import draw_params, draw_tokens, make_config

F, S = "full", "sliding"
FR, SR, FN = Kind(F, True), Kind(S, True), Kind(F, False)


@pytest.mark.parametrize(
    ("kinds", "alone", "expected"),
    [
        ((FR,) * 5, 0, [Run(0, (FR,), 5)]),
        ((SR, FR) * 3, 0, [Run(0, (SR, FR), 3)]),
        ((SR, SR, FN) * 2 + (SR,), 0, [Run(0, (SR, SR, FN), 2), Run(6, (SR,), 1)]),
        ((FR, FR, FN, FN, FN), 0, [Run(0, (FR,), 2), Run(2, (FN,), 3)]),
        ((FR,) * 4, 2, [Run(0, (FR,), 1), Run(1, (FR,), 1), Run(2, (FR,), 2)]),
        ((FR,), 0, [Run(0, (FR,), 1)]),
        ((FR, SR), 2, [Run(0, (FR,), 1), Run(1, (SR,), 1)]),
    ],
)
def test_scans_cover_all_layers_in_order(kinds, alone, expected):
    runs = _runs(kinds, alone)
    assert runs == expected
    assert tuple(kind for run in runs for kind in run.kinds * run.repeats) == kinds


def test_a_pattern_is_its_layers_one_after_the_other():
    """Five layers of the kinds s s f s s: the same layers in two models of one kind each, cut and chained."""
    attention = SlidingAttentionConfig(pattern=(S, S, F), window=2, rope_theta=50.0)
    config = make_config(num_layers=5, attention=attention)
    params, tokens = draw_params(config), draw_tokens(config, 2, 9)
    found = forward(params, {"tokens": tokens}, config)[0]
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))
    full, local = rope_tables(positions, config)
    context = AttentionContext(positions, rotary=full, local_rotary=local)
    x = params["embedding"]["table"][tokens]
    for i, kind in enumerate((S, S, F, S, S)):
        block = bind(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), Block, config)
        x = x + block.attention(block.attention_norm(x), context, kind=kind).out
        x = x + block.mlp(block.mlp_norm(x))
    expected = bind_decoder(params, config).final_norm(x) @ params["embedding"]["table"].T
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def turns(rope, dim, position):
    table = rotary_table(jnp.asarray([[position]], jnp.int32), rope, dim)
    return np.asarray(table.cos)[0, 0], np.asarray(table.sin)[0, 0]


def test_linear_stretching_divides_positions():
    plain, slow = RopeConfig(theta=100.0), RopeConfig(theta=100.0, scaling="linear", factor=4.0)
    np.testing.assert_allclose(turns(slow, 6, 12), turns(plain, 6, 3), rtol=1e-6)


def test_dynamic_stretching_begins_beyond_the_original_length():
    dynamic = RopeConfig(theta=100.0, scaling="dynamic", factor=2.0, original_length=8)
    np.testing.assert_allclose(turns(dynamic, 4, 7), turns(RopeConfig(theta=100.0), 4, 7), rtol=1e-6)
    # Length 16: theta grows by (2 * 16 / 8 - 1) to the power 4 / 2.
    np.testing.assert_allclose(turns(dynamic, 4, 15), turns(RopeConfig(theta=900.0), 4, 15), rtol=1e-5)


def test_llama3_keeps_short_waves_and_divides_long_ones():
    rope = RopeConfig(
        theta=1e6,
        scaling="llama3",
        factor=8.0,
        original_length=64,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    frequency = 1e6 ** (-np.arange(4) / 4)  # waves of 6.28, 199, 6283, 198692 tokens
    found = np.arctan2(*turns(rope, 8, 1)[::-1])
    np.testing.assert_allclose(found[0], frequency[0], rtol=1e-5)
    np.testing.assert_allclose(found[1:], frequency[1:] / 8, rtol=1e-4)


def test_yarn_mixes_between_its_bounds_and_sharpens():
    rope = RopeConfig(theta=10000.0, scaling="yarn", factor=4.0, original_length=4096)
    cos, sin = turns(rope, 64, 1)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * np.log(4) + 1, rtol=1e-5)
    ratio = np.arctan2(sin, cos) * 10000.0 ** (np.arange(32) / 32)
    # Dimensions of 32 turns and of one: 64 ln(4096 / (2 pi turns)) / (2 ln 10000) = 10.5 and 22.5.
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-4)
    np.testing.assert_allclose(ratio[23:], 0.25, rtol=1e-3)
    assert (np.diff(ratio[10:24]) < 0).all()


def test_only_the_first_dimensions_turn_and_neighbours_may_pair():
    x = jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    table = rotary_table(jnp.asarray([[2]], jnp.int32), RopeConfig(theta=16.0), 4)
    turned = np.asarray(rotate(x, table, interleaved=True))[0, 0, 0]
    first = complex(1, 2) * np.exp(2j)
    second = complex(3, 4) * np.exp(0.5j)
    np.testing.assert_allclose(turned, [first.real, first.imag, second.real, second.imag, 5, 6], rtol=1e-6)


def test_pairs_turn_by_their_coordinate():
    where = jnp.asarray([[[5, 7, 11]]], jnp.int32)
    for interleaved, coordinate in ((False, [5, 5, 7, 7, 11]), (True, [5, 7, 11, 5, 7])):
        rope = RopeConfig(theta=9.0, sections=(2, 2, 1), sections_interleaved=interleaved)
        table = rotary_table(where, rope, 10)
        angles = np.asarray(coordinate) * 9.0 ** (-np.arange(5) / 5)
        np.testing.assert_allclose(table.cos[0, 0], np.cos(angles), rtol=1e-5)
        np.testing.assert_allclose(table.sin[0, 0], np.sin(angles), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: RopeConfig(dim=3), "dim"),
        (lambda: RopeConfig(low_frequency_factor=4.0), "high_frequency_factor"),
        (lambda: ModelConfig(position=RopeConfig(dim=64)), "position.dim"),
        (lambda: ModelConfig(position=RopeConfig(sections=(1, 1))), "position.sections"),
        (lambda: RopeConfig(layers=(False, False)), "layers"),
        (lambda: ModelConfig(num_layers=1, position=RopeConfig(layers=(False, True))), "position.layers"),
        (lambda: ModelConfig(pre_norms=False), "pre_norms"),
        (lambda: ModelConfig(parallel_norms=True), "parallel_norms"),
        (lambda: SlidingAttentionConfig(pattern=(F,)), "pattern"),
        (lambda: SlidingAttentionConfig(window=0), "window"),
        (lambda: SlidingAttentionConfig(rope_theta=0.0), "rope_theta"),
        (
            lambda: ModelConfig(num_layers=1, attention=SlidingAttentionConfig(pattern=(F, S))),
            "attention.pattern",
        ),
        (lambda: ModelConfig(head_bias=True), "head_bias"),
        (lambda: ModelConfig(attention=NSAConfig(), attention_softcap=1.0), "attention_softcap"),
        (lambda: ModelConfig(attention_scale=0.0), "attention_scale"),
    ],
)
def test_errors(make, key):
    with pytest.raises(ConfigError) as raised:
        make()
    assert raised.value.key == key
