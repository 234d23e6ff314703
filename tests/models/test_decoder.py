"""The decoder against plain loops of numpy, and what must not matter to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import (
    Probe,
    RopeConfig,
    activations,
    forward,
    init_cache,
    positions_of,
    prepare_batch,
)
from jaxlab.models.rotary import rotary_table, rotate
from tests.models import oracle
from tests.models.tiny import NSA, draw_params, draw_tokens, make_config

run = jax.jit(forward, static_argnames="config")
SHAPE = (4, 18)
"""Of most batches, so that most tests share a compiled function."""


def logits(params, batch, config):
    return np.asarray(run(params, batch, config)[0])


@pytest.mark.parametrize(
    "variant",
    [
        *("rotary", "other", "sliding", "post_norms", "parallel", "nope"),
        *("nsa", "nsa_nope", "nsa_min_max", "nsa_auxiliary", "nsa_indexer", "nsa_shared"),
        pytest.param("nsa_dot", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_plain_loops(variant):
    config = make_config(variant)
    params, tokens = draw_params(config), draw_tokens(config, *SHAPE)
    found = logits(params, {"tokens": tokens}, config)
    for row, row_tokens in list(zip(found, np.asarray(tokens), strict=True))[:2]:
        expected = oracle.logits(params, row_tokens, config)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["rotary", "sliding"])
def test_chunked_attention_is_the_same(variant):
    config = make_config(variant)
    in_chunks = dataclasses.replace(config.attention, implementation="chunked")
    params, tokens = draw_params(config), draw_tokens(config, *SHAPE)
    segments = jnp.asarray(np.arange(SHAPE[1])[None] < np.array([[18], [11], [5], [1]]), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": segments}
    chunked = logits(params, batch, make_config(variant, attention=in_chunks))
    real = np.asarray(segments, bool)
    np.testing.assert_allclose(chunked[real], logits(params, batch, config)[real], rtol=1e-5, atol=1e-5)


def test_rotary_by_hand():
    x = jnp.asarray([[[[1.0, 2.0, 3.0, 4.0]]]])
    at = lambda position: rotary_table(jnp.asarray([[position]], jnp.int32), RopeConfig(theta=16.0), 4)
    turned = rotate(x, at(0))
    np.testing.assert_array_equal(turned, x)
    turned = rotate(x, at(2))  # pair 0 by 2, pair 1 by 2 / 4
    expected = [
        np.cos(2) - 3 * np.sin(2),
        2 * np.cos(0.5) - 4 * np.sin(0.5),
        3 * np.cos(2) + np.sin(2),
        4 * np.cos(0.5) + 2 * np.sin(0.5),
    ]
    np.testing.assert_allclose(turned[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "variant",
    [
        *("other", "sliding", "nope", "nsa", "nsa_min_max", "nsa_indexer"),
        pytest.param("nsa_auxiliary", marks=pytest.mark.slow),
    ],
)
def test_packed_sequences_are_the_same_alone_and_padding_does_not_matter(variant):
    config = make_config(variant)
    params = draw_params(config)
    # NSA's blocks are counted from the start of each text: the second begins at no multiple of anything.
    first, second = (np.asarray(draw_tokens(config, 1, n, seed=n)[0]).tolist() for n in (3, 13))
    rows = [
        (first + second + [0] * 2, [1] * 3 + [2] * 13 + [0] * 2),
        (first + second + [5] * 2, [4] * 3 + [9] * 13 + [0] * 2),
        (first + [7] * 15, [1] * 3 + [0] * 15),
        (second + [7] * 5, [1] * 13 + [0] * 5),
    ]
    batch = {
        "tokens": jnp.asarray([tokens for tokens, _ in rows], jnp.int32),
        "segment_ids": jnp.asarray([segments for _, segments in rows], jnp.int32),
    }
    packed, other_padding, first_alone, second_alone = logits(params, batch, config)
    np.testing.assert_allclose(packed[:3], first_alone[:3], atol=2e-5)
    np.testing.assert_allclose(packed[3:16], second_alone[:13], atol=2e-5)
    np.testing.assert_array_equal(packed[:16], other_padding[:16])
    without_segments = logits(params, {"tokens": batch["tokens"]}, config)
    np.testing.assert_allclose(without_segments[3, :13], second_alone[:13], atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "reach"), [("rotary", 18), ("sliding", 11), ("nsa", 18), ("nsa_min_max", 18)]
)
def test_a_token_is_seen_by_later_ones_only(variant, reach):
    config = make_config(variant)
    tokens = jnp.repeat(draw_tokens(config, 1, SHAPE[1]), SHAPE[0], axis=0)
    tokens = tokens.at[1, 6].set((tokens[1, 6] + 1) % 13)
    before, after, *_ = logits(draw_params(config), {"tokens": tokens}, config)
    np.testing.assert_array_equal(before[:6], after[:6])
    assert (np.abs(before[6:reach] - after[6:reach]).max(axis=1) > 1e-4).all()
    # Sliding: two layers of a window of three tokens reach back four.
    np.testing.assert_array_equal(before[reach:], after[reach:])


def test_positions_count_within_segments():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 4]], jnp.int32)
    tokens = jnp.zeros((2, 7), jnp.int32)
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(positions_of(tokens, segments), expected)
    np.testing.assert_array_equal(positions_of(tokens, None), [list(range(7))] * 2)


def test_given_positions_are_taken():
    config = make_config("other")
    params, tokens = draw_params(config), draw_tokens(config, *SHAPE)
    positions = jnp.broadcast_to(jnp.arange(5, 5 + SHAPE[1], dtype=jnp.int32)[None], SHAPE)
    shifted = logits(params, {"tokens": tokens, "positions": positions}, config)
    table = {"table": jnp.roll(params["position"]["table"], -5, axis=0)}
    np.testing.assert_array_equal(shifted, logits({**params, "position": table}, {"tokens": tokens}, config))


@pytest.mark.parametrize("variant", ["rotary", "nsa"])
def test_bfloat16_computes_near_float32_from_float32_parameters(variant):
    config = make_config(variant)
    params, tokens = draw_params(config), draw_tokens(config, *SHAPE)
    low = make_config(variant, compute_dtype="bfloat16")
    found, intermediates = run(params, {"tokens": tokens}, low)
    assert found.dtype == jnp.float32
    assert intermediates["hidden"].dtype == jnp.bfloat16
    exact = logits(params, {"tokens": tokens}, config)
    if variant == "rotary":  # NSA may choose other blocks after rounding
        assert 0 < np.abs(found - exact).max() < 0.08 * np.abs(exact).max()
    assert np.isfinite(found).all()


def test_remat_gives_the_same_gradients():
    config = make_config()
    params, tokens = draw_params(config), draw_tokens(config, 1, 6)

    def gradients(config):
        loss = lambda p: jnp.sum(jnp.sin(forward(p, {"tokens": tokens}, config)[0]))
        return jax.jit(jax.grad(loss))(params)

    kept = gradients(config)
    for remat in ("layer", "all_but_attention", "elementwise"):
        again = gradients(make_config(remat=remat))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, again)


def test_one_trace_serves_all_batches_of_a_shape_and_one_token_is_enough():
    config = make_config()
    params = draw_params(config)
    traces = []

    @jax.jit
    def counted(params, batch):
        traces.append(1)
        return forward(params, batch, config)[0]

    a, b = (counted(params, {"tokens": draw_tokens(config, 2, 1, seed)}) for seed in (0, 1))
    assert len(traces) == 1
    assert a.shape == b.shape == (2, 1, 13)
    expected = oracle.logits(params, np.asarray(draw_tokens(config, 2, 1, 1))[1], config)
    np.testing.assert_allclose(b[1], expected, atol=1e-5)


def test_a_kernel_that_is_named_and_cannot_run_is_refused_with_its_key():
    config = make_config("nsa", attention=dataclasses.replace(NSA, implementation="mosaic_gpu"))
    with pytest.raises(ConfigError, match="TF32") as error:
        forward(draw_params(config), {"tokens": draw_tokens(config, 1, 4)}, config)
    assert error.value.key == "model.attention.implementation"


def test_nsa_tells_which_blocks_it_chose():
    config = make_config("nsa")
    _, intermediates = run(draw_params(config), {"tokens": draw_tokens(config, *SHAPE)}, config)
    chosen = np.asarray(intermediates["chosen_blocks"])
    assert chosen.shape == (2, *SHAPE[:1], 2, SHAPE[1], NSA.num_blocks)
    for t in range(SHAPE[1]):
        for blocks in chosen[:, :, :, t].reshape(-1, NSA.num_blocks):
            real = [b for b in blocks if b >= 0]
            assert len(real) == min(t // 4 + 1, 3)
            assert 0 in real
            assert t // 4 in real
            assert max(real) == t // 4


def test_what_does_not_go_together():
    config = make_config()
    params, tokens = draw_params(config), draw_tokens(config, 1, 4)
    with pytest.raises(ValueError, match="no vision"):
        forward(params, {"tokens": tokens, "images": jnp.zeros((1, 1, 4, 4, 2))}, config)
    with pytest.raises(ValueError, match="with a cache a probe has factors, classes and slot_classes"):
        forward(params, {"tokens": tokens}, config, probe=Probe(), cache=init_cache(config, 1, 8))


def test_what_an_absent_branch_would_do_is_not_done():
    config = make_config("nsa", attention=dataclasses.replace(NSA, branches=("compression", "window")))
    params, tokens = draw_params(config), draw_tokens(config, *SHAPE)
    found, intermediates = run(params, {"tokens": tokens}, config)
    assert "chosen_blocks" not in intermediates
    # Neither its keys and values nor its gates matter, whatever they hold.
    layers = params["layers"]["attention"]
    for tree, name in ((layers, "key"), (layers, "value"), (layers["gate"], "bias")):
        at = (slice(None), 1) if name != "bias" else (..., 1)
        tree[name] = tree[name].at[at].set(jnp.nan)
    np.testing.assert_array_equal(logits(params, {"tokens": tokens}, config), found)


def test_flows_know_one_selector():
    config = make_config("nsa_min_max")
    blocked = np.zeros((config.num_layers, 1, 4), bool)
    with pytest.raises(ValueError, match="know no selector of NSA but compressed"):
        forward(
            draw_params(config), {"tokens": draw_tokens(config, 1, 4)}, config, probe=Probe(blocked=blocked)
        )


def test_tokens_without_a_row_are_refused_where_they_are_known():
    config = make_config()
    batch = {"tokens": jnp.asarray([[1, 13]], jnp.int32)}
    for door in (
        lambda: forward({}, batch, config),
        lambda: prepare_batch(batch, config),
        lambda: activations({}, batch, config, "logits"),
    ):
        with pytest.raises(ValueError, match="the batch holds token 13, the embedding has 13 rows"):
            door()
    params = draw_params(config)
    jax.eval_shape(lambda tokens: forward(params, {"tokens": tokens}, config), batch["tokens"])  # traced
