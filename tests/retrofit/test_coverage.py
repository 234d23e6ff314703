"""Coverage of a dense model's attention against brute force in numpy, and where it is known by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import NoPositions, forward
from jaxlab.retrofit.convert import retrofit
from jaxlab.retrofit.coverage import attention_coverage
from tests.models import oracle
from tests.models.tiny import NSA, draw_params, draw_tokens, make_config

WIDE = dataclasses.replace(NSA, compress_width=12)
LENGTHS = (18, 13)


def shares(p, xs, config, n, rotary):
    """[queries, Hkv, 4] of one layer and one row: chosen, with window, by lot, best; and chosen blocks."""
    theta, share = config.rope.theta, config.num_heads // config.kv_heads
    rotate = oracle.rotate if rotary else lambda x, *_: x
    found = np.zeros((len(xs), config.kv_heads, 4))
    blocks = [[None] * len(xs) for _ in range(config.kv_heads)]
    for group in range(config.kv_heads):
        keys = [oracle.project(p, "key", x, group) for x in xs]
        starts = range(0, len(xs) - n.block_len + 1, n.stride)
        means = [rotate(np.mean(keys[s : s + n.block_len], axis=0), s, theta) for s in starts]
        turned = np.array([rotate(k, s, theta) for s, k in enumerate(keys)])
        for t, x in enumerate(xs):
            heads = range(group * share, (group + 1) * share)
            queries = [rotate(oracle.project(p, "query", x, head), t, theta) for head in heads]
            seen = max(0, (t + 1 - n.block_len) // n.stride + 1)
            summaries = np.array(means[:seen]).reshape(seen, config.key_dim)
            weights = sum(oracle.softmax_sum(q, summaries, summaries)[1] for q in queries)
            chosen = blocks[group][t] = oracle.choose(oracle.importance(weights, t, n), t, n)
            mass = np.mean([oracle.softmax_sum(q, turned[: t + 1], turned[: t + 1])[1] for q in queries], 0)
            of = lambda some, mass=mass: sum(m for s, m in enumerate(mass) if s // n.block_size in some)
            visible = range(t // n.block_size + 1)
            count = min(n.num_blocks, len(visible))
            forced = {j for j in visible if j < n.num_init or j > t // n.block_size - n.num_local}
            lots = itertools.combinations([j for j in visible if j not in forced], count - len(forced))
            window = sum(m for s, m in enumerate(mass) if s > t - n.window or s // n.block_size in chosen)
            found[t, group] = (
                of(chosen),
                window,
                np.mean([of(forced | set(lot)) for lot in lots]),
                max(of(some) for some in itertools.combinations(visible, count)),
            )
    return found, blocks


@pytest.mark.parametrize("variant", ["rotary", "nope"])
def test_coverage_is_that_of_brute_force(variant):
    config = make_config(variant)
    params, tokens = draw_params(config), draw_tokens(config, 2, LENGTHS[0])
    segments = jnp.asarray(np.arange(LENGTHS[0])[None] < np.array(LENGTHS)[:, None], jnp.int32)
    found = attention_coverage(
        params, {"tokens": tokens, "segment_ids": segments}, config, WIDE, query_chunk=5
    )
    sparse, new = retrofit(params, config, WIDE)
    choose = jax.jit(lambda p: forward(p, {"tokens": tokens}, new)[1]["chosen_blocks"])
    chosen = np.asarray(choose(sparse))

    exact, rows = oracle.float64(params), [[], []]
    for row, length in enumerate(LENGTHS):
        xs = [exact["embedding"]["table"][t] for t in np.asarray(tokens)[row, :length]]
        for i in range(config.num_layers):
            p = oracle.layer_of(exact["layers"], i)
            normed = [oracle.norm(p["attention_norm"], x, config) for x in xs]
            of_row, blocks = shares(p["attention"], normed, config, WIDE, config.rotary_layers[i])
            rows[i].append(of_row)
            if i == 0:  # what the retrofitted model chooses, whose first layer reads the same input
                for group, t in itertools.product(range(2), range(length)):
                    assert set(chosen[0, row, group, t].tolist()) - {-1} == set(blocks[group][t])
            ys = oracle.attention(p["attention"], normed, config, config.rotary_layers[i])
            xs = [x + y for x, y in zip(xs, ys, strict=True)]
            xs = [x + oracle.mlp(p["mlp"], oracle.norm(p["mlp_norm"], x, config), config) for x in xs]
    expected = np.stack([np.concatenate(of_layer).mean(axis=0) for of_layer in rows])  # [L, Hkv, 4]
    assert (expected[..., 3] > expected[..., 0]).all()
    assert (expected[..., 1] > expected[..., 0]).any()
    np.testing.assert_allclose(np.stack(found[:4], axis=-1), expected, rtol=1e-5)
    with_choice = [t // WIDE.block_size >= WIDE.num_blocks for length in LENGTHS for t in range(length)]
    np.testing.assert_allclose(found.choice, np.mean(with_choice))


def by_hand(query_bias, tokens):
    """Coverage of one layer whose queries are constant, and whose keys are 1 for token 1, -1 for others."""
    config = make_config(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        attention_bias=True,
        position=NoPositions(),
        value_head_dim=None,
    )
    params = jax.tree.map(jnp.zeros_like, draw_params(config))
    layer = params["layers"]
    layer["attention_norm"]["scale"] = jnp.ones_like(layer["attention_norm"]["scale"])
    layer["attention"]["query_bias"] = jnp.full_like(layer["attention"]["query_bias"], query_bias)
    layer["attention"]["key"] = jnp.ones_like(layer["attention"]["key"]) / 12
    params["embedding"]["table"] = jnp.full((13, 12), -1.0).at[1].set(1.0)
    tokens = jnp.asarray([tokens], jnp.int32)
    found = attention_coverage(params, {"tokens": tokens}, config, WIDE)
    return {name: float(share[0, 0]) for name, share in found._asdict().items() if name != "choice"}


def test_uniform_attention():
    found = by_hand(0.0, [0] * 18)
    full = [t // 4 for t in range(18)]
    own = [t % 4 + 1 for t in range(18)]
    # One of three blocks is the query's own, whose tokens are fewer; all others are alike.
    chosen = np.mean([(4 * min(f, 2) + r) / (t + 1) for t, (f, r) in enumerate(zip(full, own, strict=True))])
    best = np.mean([12 / (t + 1) if f > 2 else 1.0 for t, f in enumerate(full)])
    assert found["chosen"] == pytest.approx(chosen)
    assert found["random"] == pytest.approx(chosen)
    assert found["best"] == pytest.approx(best)


def test_attention_to_one_block():
    found = by_hand(20.0, [1 if t // 4 == 1 else 0 for t in range(18)])
    assert found["chosen"] == pytest.approx(1.0)
    assert found["with_window"] == pytest.approx(1.0)
    assert found["best"] == pytest.approx(1.0)
    # The first block and the query's own are forced; a lot hits the one that matters once in 1, 2 or 3.
    assert found["random"] == pytest.approx((12 + 4 / 2 + 2 / 3) / 18)


def test_a_model_that_cannot_be_retrofitted_is_refused():
    config = make_config("sliding")
    with pytest.raises(ConfigError, match="only full attention can be retrofitted"):
        attention_coverage(draw_params(config), {"tokens": draw_tokens(config, 1, 8)}, config, WIDE)
