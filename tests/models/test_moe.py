"""Experts against plain loops of numpy: routing, shared experts, gradients, load balance, dense layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.costs.flops import train_flops_per_token
from jaxlab.errors import ConfigError
from jaxlab.losses import loss_sum
from jaxlab.models import ModelConfig, MoEConfig, abstract_params, bind, count_params, forward, init_params
from jaxlab.models.decoder import attention_context
from jaxlab.models.expert_parallel import Devices
from jaxlab.models.moe import MixtureOfExperts, expert_stats, route
from jaxlab.training import OptimizerConfig, State, make_optimizer, train_step
from jaxlab.training.step import balanced
from tests.models.tiny import draw_params, draw_tokens, make_config

SIX = MoEConfig(num_experts=6, experts_per_token=2, width=5)
VARIANTS = {
    "plain": SIX,
    "shared": dataclasses.replace(SIX, shared_width=7, shared_gate=True, scale=2.5, normalize=False),
    "sigmoid": dataclasses.replace(SIX, scoring="sigmoid", experts_per_token=3),
    "all": dataclasses.replace(SIX, experts_per_token=6),
    "groups": dataclasses.replace(
        SIX, num_groups=3, groups_per_token=2, experts_per_token=3, router_dtype="float32"
    ),
    "chosen apart": dataclasses.replace(
        SIX, scoring="sigmoid", choice_bias=True, num_groups=2, group_score="top2", scale=1.5
    ),
    "biased": dataclasses.replace(SIX, router_bias=True, bias=True, swiglu_limit=0.3, swiglu_alpha=1.3),
}


def silu(x):
    return x / (1 + np.exp(-x))


def by_loops(params, x, m):
    """One token and one expert at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out = np.zeros(x.shape)
    for t, token in enumerate(np.asarray(x, np.float64)):
        logits = token @ p["router"] + p.get("router_bias", 0.0)
        scores = (
            np.exp(logits) / np.exp(logits).sum() if m.scoring == "softmax" else 1 / (1 + np.exp(-logits))
        )
        rated = scores + p.get("choice_bias", 0.0)
        groups = rated.reshape(m.num_groups, -1)
        worth = [sum(sorted(group)[-1 if m.group_score == "max" else -2 :]) for group in groups]
        best = sorted(range(m.num_groups), key=lambda g: (-worth[g], g))[: m.groups_per_token]
        allowed = [e for e in range(m.num_experts) if e // groups.shape[1] in best]
        chosen = sorted(allowed, key=lambda e: (-rated[e], e))[: m.experts_per_token]
        total = sum(scores[e] for e in chosen) if m.normalize else 1.0
        for e in chosen:
            gate, up = (
                token @ p[name][e] + (p[f"{name}_bias"][e] if m.bias else 0) for name in ("gate", "up")
            )
            hidden = silu(gate) * up
            if m.swiglu_limit is not None:
                gate, up = np.minimum(gate, m.swiglu_limit), np.clip(up, -m.swiglu_limit, m.swiglu_limit)
                hidden = gate / (1 + np.exp(-m.swiglu_alpha * gate)) * (up + 1)
            expert = hidden @ p["down"][e] + (p["down_bias"][e] if m.bias else 0)
            out[t] += m.scale * scores[e] / total * expert
        if m.shared_width:
            s = p["shared"]
            hidden = silu(token @ s["gate"]) * (token @ s["up"])
            out[t] += hidden @ s["down"] / (1 + np.exp(-(token @ p["shared_gate"])))
    return out


@functools.partial(jax.jit, static_argnames="config")
def experts(params, x, config, real=None):
    return bind(params, MixtureOfExperts, config, 1.0)(x, real)


@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_that_of_plain_loops(name):
    config = make_config(moe=VARIANTS[name])
    params = jax.tree.map(lambda leaf: leaf[1], draw_params(config)["layers"]["moe"])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 12)), jnp.float32)
    found, _ = experts(params, x, config)
    expected = by_loops(params, x.reshape(10, 12), VARIANTS[name]).reshape(2, 5, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def balance_of(routed, moe):
    _, chosen, scores = routed
    return expert_stats(chosen, scores, jnp.ones(chosen.shape, bool), moe, Devices()).balance_loss


def test_ties_go_to_the_lower_experts_and_an_even_load_costs_one():
    router = jnp.zeros((4, 6))
    balance = lambda router, x, moe: balance_of(route(router, x, moe), moe)
    weights, chosen, _ = route(router, jnp.ones((3, 4)), SIX)
    assert chosen.tolist() == [[0, 1]] * 3
    np.testing.assert_allclose(weights, 0.5)
    np.testing.assert_allclose(
        balance(router, jnp.ones((3, 4)), SIX), 1.0
    )  # even probabilities cost 1 whatever the load
    one_each = dataclasses.replace(SIX, num_experts=3, experts_per_token=1)
    eye = 50 * jnp.eye(3)
    np.testing.assert_allclose(balance(eye, jnp.eye(3), one_each), 1.0, rtol=1e-5)
    np.testing.assert_allclose(balance(eye, jnp.eye(3)[:1].repeat(3, axis=0), one_each), 3.0, rtol=1e-5)


def test_gradients_are_those_of_weighing_all_experts():
    """The same choice by masks over all experts, which plain autodiff differentiates."""
    config = make_config(moe=VARIANTS["shared"])
    m = config.moe
    params = jax.tree.map(lambda leaf: leaf[0], draw_params(config)["layers"]["moe"])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 7, 12)), jnp.float32)

    def masked(p, x):
        scores = jax.nn.softmax(x @ p["router"])
        kept = scores >= jax.lax.top_k(scores, m.experts_per_token)[0][..., -1:]
        gate, up = (jnp.einsum("btd,edf->btef", x, p[name]) for name in ("gate", "up"))
        hidden = jax.nn.silu(gate) * up
        y = jnp.einsum("btef,efd,bte->btd", hidden, p["down"], jnp.where(kept, scores, 0.0)) * m.scale
        s = p["shared"]
        shared = (jax.nn.silu(x @ s["gate"]) * (x @ s["up"])) @ s["down"]
        return y + shared * jax.nn.sigmoid(jnp.einsum("btd,d->bt", x, p["shared_gate"]))[..., None]

    gradients = [
        jax.jit(jax.grad(lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))), argnums=(0, 1)))(params, x)
        for f in (lambda p, x: experts(p, x, config)[0], masked)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)


def test_first_layers_may_be_dense_and_the_balance_loss_joins_the_loss():
    moe = dataclasses.replace(SIX, first_dense=1)
    config = make_config(num_layers=3, moe=moe)
    params, tokens = draw_params(config), draw_tokens(config, 2, 6)
    assert params["dense_layers"]["mlp"]["up"].shape == (1, 12, 8)
    assert params["layers"]["moe"]["up"].shape == (2, 6, 12, 5)
    run = jax.jit(forward, static_argnames="config")
    _, intermediates = run(params, {"tokens": tokens}, config)
    assert intermediates["balance_loss"].shape == (2,)
    assert (np.asarray(intermediates["balance_loss"]) > 0.3).all()
    # With experts that are all the same MLP, and a dense layer of that MLP, it is a dense model.
    same = jax.tree.map(lambda leaf: leaf, params)
    for name in ("gate", "up", "down"):
        first = params["layers"]["moe"][name][:, :1]
        same["layers"]["moe"][name] = jnp.broadcast_to(first, params["layers"]["moe"][name].shape)
    plain = make_config(num_layers=3, mlp_width=5)
    dense = {name: leaf for name, leaf in same.items() if name != "dense_layers"}
    first_layer = jax.tree.map(lambda leaf: leaf, params["dense_layers"])
    first_layer["mlp"] = {k: v[:, :, :5] if k != "down" else v[:, :5] for k, v in first_layer["mlp"].items()}
    rest = {**same["layers"], "mlp": {n: same["layers"]["moe"][n][:, 0] for n in ("gate", "up", "down")}}
    del rest["moe"]
    dense["layers"] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first_layer, rest)
    narrow = {**same, "dense_layers": first_layer}
    found, _ = run(narrow, {"tokens": tokens}, dataclasses.replace(config, mlp_width=5))
    np.testing.assert_allclose(found, run(dense, {"tokens": tokens}, plain)[0], rtol=2e-5, atol=2e-5)

    weighted = dataclasses.replace(config, moe=dataclasses.replace(moe, balance_loss=0.5))
    loss = jax.jit(loss_sum, static_argnums=2)
    (total, count), (more, _) = (loss(params, {"tokens": tokens}, c) for c in (config, weighted))
    added = 0.5 * count * np.mean(intermediates["balance_loss"])
    np.testing.assert_allclose(more - total, added, rtol=1e-4)


@pytest.mark.parametrize("group", [None, 3])
def test_a_full_expert_drops_the_later_tokens_of_a_group(group):
    """Against a plain loop over tokens: what is dropped is counted, and no token depends on a later one."""
    moe = dataclasses.replace(VARIANTS["shared"], capacity_factor=0.75, capacity_group=group)
    config = make_config(moe=moe)
    params = jax.tree.map(lambda leaf: leaf[1], draw_params(config)["layers"]["moe"])
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 7, 12)), jnp.float32)
    found, stats = experts(params, x, config)
    capacity, of_group = moe.capacity(group or 7), group or 7
    assert capacity == {None: 2, 3: 1}[group]
    _, chosen, _ = route(params["router"], x.reshape(14, 12), moe)
    expected, dropped = np.zeros((14, 12)), 0
    for row in range(2):
        for first in range(0, 7, of_group):
            taken = np.zeros(6, int)
            for t in range(7 * row + first, 7 * row + min(first + of_group, 7)):
                full = taken[np.asarray(chosen[t])] >= capacity
                taken[np.asarray(chosen[t])] += 1
                dropped += full.sum()
                kept = jax.tree.map(np.array, params)
                kept["down"][np.asarray(chosen[t])[full]] = 0  # it gets nothing from these
                expected[t] = by_loops(kept, x.reshape(14, 12)[t : t + 1], moe)[0]
    assert dropped > 2
    np.testing.assert_allclose(found.reshape(14, 12), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.dropped_choices, dropped / 28, rtol=1e-5)
    np.testing.assert_allclose(stats.expert_load, np.bincount(np.ravel(chosen), minlength=6) / 28, rtol=1e-6)
    changed, _ = experts(params, x.at[:, 5:].set(9.0), config)
    np.testing.assert_array_equal(changed[:, :5], found[:, :5])


BALANCED = dataclasses.replace(VARIANTS["chosen apart"], num_groups=1, group_score="max", bias_rate=0.02)


def test_biases_of_the_choice_move_towards_an_even_load():
    """Experts that almost all tokens prefer lose them, and no weight changes."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 12)), jnp.float32)
    router = jnp.asarray(rng.standard_normal((12, 6)) * 0.1, jnp.float32)
    params = {"layers": {"moe": {"choice_bias": jnp.asarray([[0.3, 0.2, 0, 0, 0, 0]])}}}
    loads = []
    for _ in range(30):
        bias = params["layers"]["moe"]["choice_bias"]
        _, chosen, _ = route(router, x, BALANCED, None, bias[0])
        load = jnp.bincount(chosen.reshape(-1), length=6) / chosen.size
        loads.append(float(jnp.max(load)))
        moved = balanced(params, load[None], BALANCED)["layers"]["moe"]["choice_bias"] - bias
        np.testing.assert_array_equal(np.sign(moved[0]), -np.sign(np.asarray(load) - np.float32(1 / 6)))
        np.testing.assert_allclose(jnp.abs(moved[moved != 0]), 0.02, rtol=1e-4)
        not_made = balanced(params, load[None], BALANCED, jnp.asarray(False))
        np.testing.assert_array_equal(not_made["layers"]["moe"]["choice_bias"], bias)
        params = balanced(params, load[None], BALANCED)
    assert loads[0] > 0.45
    assert max(loads[-3:]) < 0.25


def test_a_training_step_moves_them_by_the_load_of_all_its_parts():
    config = make_config(num_layers=2, moe=dataclasses.replace(BALANCED, first_dense=1))
    params, tokens = draw_params(config), draw_tokens(config, 4, 6)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), config, 3)
    state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    step = jax.jit(train_step, static_argnames=("config", "optimizer", "accumulation"))
    new, metrics = step(state, {"tokens": tokens}, config, optimizer, 2)
    load = jax.jit(forward, static_argnames="config")(params, {"tokens": tokens}, config)[1]["expert_load"]
    np.testing.assert_allclose(metrics["expert_load_max"], 6 * np.max(load), rtol=1e-5)
    of = lambda params: np.asarray(params["layers"]["moe"]["choice_bias"])
    moves = 0.02 * np.sign(np.round(1 / 6 - np.asarray(load), 6))
    np.testing.assert_allclose(of(new.params) - of(params), moves, atol=1e-6)
    assert np.any(moves)


def test_counting_takes_the_experts_that_a_token_passes():
    dense = ModelConfig(mlp_width=100)
    sparse = ModelConfig(moe=MoEConfig(num_experts=8, experts_per_token=2, width=50))
    router = 4 * 128 * 8
    difference = train_flops_per_token(sparse, 64) - train_flops_per_token(dense, 64)
    np.testing.assert_allclose(difference, 6 * router)
    params = jax.eval_shape(lambda: init_params(sparse, jax.random.key(0)))
    assert count_params(params) == count_params(abstract_params(sparse))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: MoEConfig(num_experts=2, experts_per_token=3), "experts_per_token"),
        (lambda: MoEConfig(num_experts=2, shared_gate=True), "shared_gate"),
        (lambda: MoEConfig(num_experts=0), "num_experts"),
        (lambda: MoEConfig(num_experts=6, num_groups=4), "num_groups"),
        (lambda: MoEConfig(num_experts=6, num_groups=3, groups_per_token=4), "groups_per_token"),
        (lambda: MoEConfig(num_experts=6, num_groups=3, experts_per_token=3), "groups_per_token"),
        (
            lambda: MoEConfig(num_experts=3, experts_per_token=1, num_groups=3, group_score="top2"),
            "group_score",
        ),
        (lambda: MoEConfig(num_experts=6, swiglu_limit=0.0), "swiglu_limit"),
        (lambda: MoEConfig(num_experts=6, bias_rate=0.001), "bias_rate"),
        (lambda: MoEConfig(num_experts=6, capacity_group=8), "capacity_group"),
        (lambda: MoEConfig(num_experts=6, capacity_factor=0.0), "capacity_factor"),
        (lambda: ModelConfig(num_layers=2, moe=MoEConfig(num_experts=4, first_dense=2)), "moe.first_dense"),
        (lambda: ModelConfig(mlp="plain", moe=MoEConfig(num_experts=4)), "moe"),
    ],
)
def test_errors(make, key):
    with pytest.raises(ConfigError) as raised:
        make()
    assert raised.value.key == key


def test_padding_has_no_part_in_the_load():
    """What stands in rows that are not full counts neither as load nor as dropped, nor in the balance."""
    moe = dataclasses.replace(VARIANTS["sigmoid"], capacity_factor=0.75, capacity_group=4)
    config = make_config(moe=moe)
    params = jax.tree.map(lambda leaf: leaf[1], draw_params(config)["layers"]["moe"])
    x = np.random.default_rng(5).standard_normal((2, 8, 12)).astype(np.float32)
    batch = {"tokens": jnp.zeros((2, 8), jnp.int32), "segment_ids": jnp.asarray([[1] * 6 + [0] * 2, [1] * 8])}
    real = attention_context(batch, config).real
    assert real.tolist() == [[True] * 6 + [False] * 2, [True] * 8]
    _, found = experts(params, jnp.asarray(x), config, real)
    x[0, 6:] = 3.0
    _, other = experts(params, jnp.asarray(x), config, real)
    jax.tree.map(np.testing.assert_array_equal, found, other)
    choices = 14 * 3 * np.asarray(found.expert_load)
    np.testing.assert_allclose(choices, np.round(choices), atol=1e-5)
    assert choices.sum() == pytest.approx(14 * 3)
    assert found.dropped_choices > 0
