"""The optimizer: what decays, the schedule's values, clipping, and a slower language model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
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
    ],
)
def test_impossible_values_name_the_key(options, key):
    with pytest.raises(ConfigError) as raised:
        OptimizerConfig(**options)
    assert raised.value.key == key
