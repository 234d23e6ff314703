"""The optimizer: what decays, the schedule's values, clipping, and a slower language model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.errors import ConfigError, UserError
from jaxlab.models import LatentConfig, MoEConfig, RopeConfig, abstract_params
from jaxlab.training import EmaConfig, GroupConfig, MuonConfig, OptimizerConfig, averaged
from jaxlab.training.optimizer import make_optimizer
from jaxlab.training.schedule import make_schedule
from jaxlab.training.spikes import SpikesConfig, skip_spikes
from tests.models.tiny import NSA, VISION, draw_params, make_config


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def first_update(model, gradient, **options):
    """What the first update adds to each parameter, with every gradient equal to `gradient`."""
    config = OptimizerConfig(**({"warmup_steps": 0, "schedule": "constant", "learning_rate": 0.1} | options))
    optimizer = make_optimizer(config, model, 10)
    params = draw_params(model)
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)

    def update(grads, params):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, optimizer.init(params), params)[0]

    return named(params), named(jax.jit(update)(grads, params))


def test_matrices_decay_and_nothing_else_does():
    everything = make_config("other", attention=NSA, vision=VISION, num_layers=1)
    params, updates = first_update(everything, 0.0, weight_decay=0.5)
    decayed = {name for name, update in updates.items() if (update != 0).any()}
    for name in decayed:
        np.testing.assert_allclose(updates[name], -0.1 * 0.5 * params[name], rtol=1e-5)
    kept = {
        name for name in updates if name.rpartition(".")[2] == "scale" or "bias" in name or "position" in name
    }
    assert decayed == set(updates) - kept
    assert {"embedding.table", "head.table", "projector.output", "vision.patch.table"} < decayed
    assert {"position.table", "layers.attention.compress_key.position", "layers.attention.gate.bias"} < kept


def test_schedule():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="linear", final_fraction=0.1)
    rate = make_schedule(config, 14)
    np.testing.assert_allclose([float(rate(i)) for i in range(5)], [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose([float(rate(i)) for i in (4 + 3, 13)], [2 - 1.8 / 3, 0.2], rtol=1e-6)
    cosine = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1), 14)
    half = 2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 3 / 9)))
    np.testing.assert_allclose([float(cosine(i)) for i in (4, 7, 13)], [2, half, 0.2], rtol=1e-6)
    constant = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=1, schedule="constant"), 9)
    assert [float(constant(i)) for i in (0, 1, 8)] == [0, 2, 2]
    # A warm-up longer than the training is cut to it; one step takes the peak.
    assert float(make_schedule(OptimizerConfig(learning_rate=2.0), 3)(2)) == 2
    assert float(make_schedule(OptimizerConfig(learning_rate=2.0), 1)(0)) == 2


def test_clipping_bounds_what_the_moments_see():
    model = make_config(num_layers=1)
    # AdamW's first update is g / (|g| + eps): with a large eps it tells the size of g.
    _, free = first_update(model, 3.0, clip_norm=0.0, eps=1e3, weight_decay=0.0)
    params, clipped = first_update(model, 3.0, clip_norm=1.0, eps=1e3, weight_decay=0.0)
    norm = 3.0 * np.sqrt(sum(p.size for p in params.values()))
    np.testing.assert_allclose(free["final_norm.scale"], -0.1 * 3.0 / 1003, rtol=1e-4)
    np.testing.assert_allclose(clipped["final_norm.scale"], -0.1 * (3.0 / norm) / 1e3, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_the_language_model_learns_at_its_own_rate(scale):
    model = make_config("vision", num_layers=1)
    _, plain = first_update(model, 1.0)
    _, scaled = first_update(model, 1.0, language_scale=scale)
    for name, update in scaled.items():
        other = name.startswith(("vision.", "projector."))
        np.testing.assert_allclose(update, plain[name] * (1.0 if other else scale), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"beta2": 1.0}, "beta2"),
        ({"final_fraction": 1.5}, "final_fraction"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"decay_fraction": 1.5}, "decay_fraction"),
    ],
)
def test_impossible_values_name_the_key(options, key):
    with pytest.raises(ConfigError) as raised:
        OptimizerConfig(**options)
    assert raised.value.key == key


def test_warmup_stable_decay():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=4, schedule="wsd", decay_fraction=0.25, final_fraction=0.1
    )
    rate = make_schedule(config, 20)
    np.testing.assert_allclose([float(rate(i)) for i in (0, 2, 4, 10, 14)], [0, 1, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose([float(rate(i)) for i in (15, 19)], [2 - 1.8 / 5, 0.2], rtol=1e-6)
    for shape, half in (("cosine", 1.1), ("sqrt", 2 * (1 - 0.9 * np.sqrt(0.5)))):
        rate = make_schedule(dataclasses.replace(config, decay=shape, decay_fraction=0.4), 20)
        np.testing.assert_allclose([float(rate(i)) for i in (11, 15, 19)], [2, half, 0.2], rtol=1e-6)
    # Short runs still end at the last step.
    assert float(make_schedule(config, 3)(2)) == 2
    np.testing.assert_allclose(float(make_schedule(config, 6)(5)), 0.2, rtol=1e-6)


def test_inverse_square_root():
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="inverse_sqrt"), 400)
    np.testing.assert_allclose([float(rate(i)) for i in (2, 4, 16, 100)], [1, 2, 1, 0.4], rtol=1e-6)


def test_groups():
    model = make_config(num_layers=1, tie_embeddings=False)
    groups = (
        GroupConfig("layers.mlp.up", learning_rate=0.0),
        GroupConfig("layers.mlp", learning_rate=0.3, weight_decay=0.0),
        GroupConfig("*.scale", weight_decay=0.5),
        GroupConfig("head.table", learning_rate=0.02),
    )
    params, updates = first_update(model, 1.0, groups=groups, weight_decay=0.1, clip_norm=0.0)
    decay = lambda name, rate: -rate * (1 + 0.1 * params[name])
    for name, expected in {
        "layers.mlp.up": 0.0,
        "layers.mlp.down": -0.3,
        "final_norm.scale": -0.1 * (1 + 0.5 * params["final_norm.scale"]),
        "head.table": decay("head.table", 0.02),
        "embedding.table": decay("embedding.table", 0.1),
    }.items():
        np.testing.assert_allclose(updates[name], np.broadcast_to(expected, updates[name].shape), rtol=1e-5)


def test_what_is_frozen_has_no_moments_and_no_part_in_the_norm():
    model = make_config(num_layers=1)
    frozen = tuple(GroupConfig(p, learning_rate=0.0) for p in ("layers", "embedding"))
    optimizer = make_optimizer(OptimizerConfig(groups=frozen), model, 10)
    state = jax.eval_shape(optimizer.init, abstract_params(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * model.width + 2  # the last norm, counters
    options = {"clip_norm": 1.0, "eps": 1e3, "weight_decay": 0.0, "groups": frozen}
    _, updates = first_update(model, 3.0, **options)
    norm = 3.0 * np.sqrt(model.width)
    np.testing.assert_allclose(updates["final_norm.scale"], -0.1 * (3 / norm) / 1e3, rtol=1e-3)
    with pytest.raises(UserError, match="every parameter is frozen"):
        make_optimizer(OptimizerConfig(groups=(GroupConfig("*", learning_rate=0.0),)), model, 10)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layers.mpl", "did you mean layers.mlp?"),
        ("vision", "there are language, embedding, final_norm, layers"),
    ],
)
def test_a_group_that_matches_nothing_is_refused_with_a_hint(pattern, hint):
    config = OptimizerConfig(groups=(GroupConfig("language"), GroupConfig(pattern, learning_rate=0.1)))
    with pytest.raises(UserError, match=rf"optimizer\.groups\.1\.pattern: .*'{pattern}'; {hint}"):
        make_optimizer(config, make_config(num_layers=1), 10)


def newton_schulz(matrix):
    """Keller Jordan's iteration for one matrix, in float64."""
    x = np.asarray(matrix, np.float64)
    x = x / (np.linalg.norm(x) + 1e-8)
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def as_matrices(name, value):
    """The matrices of a parameter as they stand in a checkpoint: of each layer, branch and expert one."""
    last = name.rpartition(".")[2]
    if "attention" in name:
        shape = {
            "query": (-1, 12, 16),
            "key": (-1, 12, 8),
            "value": (-1, 12, 12),
            "output": (-1, 24, 12),
            "query_down": (-1, 12, 10),
            "query_up": (-1, 10, 16),
            "kv_down": (-1, 12, 6),
            "key_up": (-1, 6, 8),
            "value_up": (-1, 6, 24),
            "shared_key": (-1, 12, 2),
        }
        if "compress" in name:  # block_len 4 times head_dim to 4, and back
            size = value.shape[2] if last == "hidden" else value.shape[-1]
            shape = {"hidden": (-1, 4 * size, 4), "output": (-1, 4, size)}
        return value.reshape(shape[last])
    return value.reshape(-1, *value.shape[-2:])


@pytest.mark.parametrize(
    ("variant", "rms"), [("nsa", 0.2), pytest.param("latent", None, marks=pytest.mark.slow)]
)
def test_muon_is_newton_schulz_of_every_matrix(variant, rms):
    if variant == "nsa":
        model = make_config("nsa", num_layers=2)
        rest = {"embedding.table", "layers.attention.gate.output"}
    else:
        latent = LatentConfig(kv_rank=6, query_rank=10)
        model = make_config(
            latent=latent,
            position=RopeConfig(dim=2),
            num_kv_heads=None,
            moe=MoEConfig(num_experts=3, width=7),
        )
        rest = {"embedding.table", "layers.moe.router"}
    config = OptimizerConfig(
        warmup_steps=0,
        schedule="constant",
        learning_rate=0.1,
        weight_decay=0.0,
        clip_norm=0.0,
        muon=MuonConfig(learning_rate=0.3, rms=rms, momentum=0.9),
    )
    params = draw_params(model)
    grads = jax.tree.map(lambda p: jnp.sin(7.0 * p) + 0.1, params)
    optimizer = make_optimizer(config, model, 10)

    def two_updates(grads, params):
        with jax.numpy_dtype_promotion("standard"):
            _, state = optimizer.update(grads, optimizer.init(params), params)
            return optimizer.update(jax.tree.map(lambda g: g * g, grads), state, params)[0]

    updates, grads = named(jax.jit(two_updates)(grads, params)), named(grads)
    seen = set()
    for name, update in updates.items():
        if name in rest or np.ndim(update) < 2 or name.endswith(("bias", "scale", "position")):
            continue
        seen.add(name)
        first = grads[name].astype(np.float64)
        second = first * first
        mean = 0.9 * (0.1 * first) + 0.1 * second
        ahead = 0.9 * mean / (1 - 0.9**3) + 0.1 * second / (1 - 0.9**2)
        for ours, matrix in zip(as_matrices(name, update), as_matrices(name, ahead), strict=True):
            fan_in, fan_out = matrix.shape
            scale = max(1, fan_out / fan_in) ** 0.5 if rms is None else rms * max(fan_in, fan_out) ** 0.5
            np.testing.assert_allclose(ours, -0.3 * scale * newton_schulz(matrix), atol=2e-4 * scale)
    assert len(seen) >= 7, seen
    # AdamW's first steps are about the learning rate for each number, whatever the gradient.
    for name in rest:
        assert 0.02 < np.abs(updates[name]).mean() < 0.2


def test_the_average_follows_the_parameters():
    model = make_config(num_layers=1)
    config = OptimizerConfig(warmup_steps=0, weight_decay=0.0, ema=EmaConfig(decay=0.5))
    optimizer = skip_spikes(make_optimizer(config, model, 10), SpikesConfig(action="skip"))
    params = draw_params(model)
    state, expected = optimizer.init(params), params

    @jax.jit
    def step(state, params, loss):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(params, state, params, loss=loss)
            return state, optax.apply_updates(params, updates)

    for n, loss in ((1, 1.0), (2, 1.0), (None, jnp.nan), (3, 1.0)):
        state, params = step(state, params, jnp.float32(loss))
        if n is not None:  # the spike is left out of the average too
            kept = min(0.5, (1 + n) / (10 + n))
            expected = jax.tree.map(lambda e, p, k=kept: k * e + (1 - k) * p, expected, params)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, averaged(state), expected)
    assert averaged(make_optimizer(OptimizerConfig(), model, 10).init(params)) is None
