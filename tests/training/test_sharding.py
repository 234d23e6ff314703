"""The mesh: several devices give what one gives, and what cannot be split is said in one line."""

import functools

import jax
import numpy as np
import pytest

from jaxlab.errors import ConfigError, UserError
from jaxlab.models.sharding import MeshConfig, batch_shardings, make_mesh, param_shardings, place_batch
from jaxlab.training.optimizer import OptimizerConfig, make_optimizer
from jaxlab.training.state import state_shardings
from jaxlab.training.step import State, train_step
from tests.models.tiny import VISION, draw_params, draw_tokens, make_config


def after_three_steps(config, mesh_config, accumulation=1):
    mesh = make_mesh(mesh_config)
    # A key bias has no gradient but rounding errors, which Adam with a tiny eps would blow up to full steps.
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=0.01, eps=1e-4), config, 3)
    shardings = state_shardings(config, optimizer, mesh)
    params = draw_params(config)
    state = State(np.int32(0), params, optimizer.init(params))
    state = jax.tree.map(jax.device_put, state, shardings)
    update = jax.jit(
        functools.partial(train_step, config=config, optimizer=optimizer, accumulation=accumulation),
        out_shardings=(shardings, None),
    )
    rng = np.random.default_rng(0)
    for step in range(3):
        batch = {"tokens": np.array(draw_tokens(config, 8, 6, seed=step))}
        batch["loss_mask"] = rng.random((8, 6)) < 0.6
        if config.has_vision:
            batch["tokens"][:, :4] = VISION.image_token
            batch["images"] = rng.standard_normal((8, 1, 4, 4, 2)).astype(np.float32)
        state, metrics = update(state, place_batch(batch, mesh))
    assert update._cache_size() == 1
    return state, float(metrics["loss"])


@functools.cache
def on_one_device(variant):
    return after_three_steps(make_config(variant), MeshConfig(data=1, fsdp=1))


@pytest.mark.parametrize(
    ("variant", "data", "fsdp", "accumulation"),
    [
        pytest.param("rotary", 4, 1, 1, marks=pytest.mark.slow),
        ("rotary", 1, 4, 2),
        pytest.param("vision", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("nsa", 2, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_four_devices_train_as_one_does(variant, data, fsdp, accumulation):
    state, loss = after_three_steps(make_config(variant), MeshConfig(data=data, fsdp=fsdp), accumulation)
    alone, loss_alone = on_one_device(variant)
    assert loss == pytest.approx(loss_alone, abs=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, state.params, alone.params)
    up = state.params["layers"]["mlp"]["up"]
    assert len(up.sharding.device_set) == 4
    assert up.sharding.shard_shape(up.shape) == (2, 12 // fsdp, 8)
    moment = state.optimizer[1][0].mu["layers"]["mlp"]["up"]
    assert moment.sharding.shard_shape(up.shape) == (2, 12 // fsdp, 8)


def test_meshes():
    assert dict(make_mesh(MeshConfig()).shape) == {
        "data": 4,
        "fsdp": 1,
        "model": 1,
        "context": 1,
        "expert": 1,
    }
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1)).shape) == {
        "data": 2,
        "fsdp": 2,
        "model": 1,
        "context": 1,
        "expert": 1,
    }
    assert make_mesh(MeshConfig(data=1, fsdp=2)).size == 2
    batch = {"tokens": np.zeros((8, 6)), "images": np.zeros((8, 6, 2))[:, :3]}
    stretch = lambda batch, mesh, name="tokens": batch_shardings(batch, make_mesh(mesh))[name].shard_shape(
        batch[name].shape
    )
    assert stretch(batch, MeshConfig()) == (2, 6)
    assert stretch({"tokens": np.zeros((6, 6))}, MeshConfig()) == (6, 6)
    assert stretch(batch, MeshConfig(fsdp=2, context=2, data=1)) == (4, 3)
    assert stretch(batch, MeshConfig(context=2), "images") == (4, 3, 2)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (-1, 3), (-1, 8), (3, 2)])
def test_a_mesh_that_does_not_fit_the_devices(data, fsdp):
    with pytest.raises(UserError, match=r"devices, 4 are here; change the axes of mesh"):
        make_mesh(MeshConfig(data=data, fsdp=fsdp))


@pytest.mark.parametrize(("data", "fsdp", "key"), [(0, 1, "data"), (1, -2, "fsdp"), (-1, -1, "fsdp")])
def test_impossible_mesh_configs(data, fsdp, key):
    with pytest.raises(ConfigError) as raised:
        MeshConfig(data=data, fsdp=fsdp)
    assert raised.value.key == key


def test_a_width_that_cannot_be_split_is_named():
    config = make_config(width=14)
    with pytest.raises(UserError, match=r"table: its embed axis of 14 cannot be split over 4 devices"):
        param_shardings(config, make_mesh(MeshConfig(data=1, fsdp=4)))
