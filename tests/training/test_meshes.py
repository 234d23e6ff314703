"""Heads and sequences split over devices: loss and gradients are those of one device, and refusals."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlab.costs import read_collectives
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import MoEConfig, abstract_params, bind, forward, logical_axes
from jaxlab.models.axis_rules import partition_spec
from jaxlab.models.mesh import Part, in_parts, split_tokens
from jaxlab.models.moe import MixtureOfExperts
from jaxlab.models.sharding import MeshConfig, check_batch, make_mesh, on_mesh, param_shardings
from jaxlab.tasks import main
from tests.models.tiny import draw_params, draw_tokens, make_config
from tests.training.on_meshes import LENGTH, MODELS, compare

BOTH = MeshConfig(data=1, model=2, context=2)
CONTEXT = MeshConfig(data=1, context=4)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "mesh", "packed"),
    [
        ("nsa_experts", MeshConfig(data=1, context=2, expert=2), True),
        pytest.param("full", BOTH, True, marks=pytest.mark.slow),
        pytest.param("nsa", BOTH, True, marks=pytest.mark.slow),
        pytest.param("full", CONTEXT, True, marks=pytest.mark.slow),
        pytest.param("experts", MeshConfig(data=1, expert=2, model=2), True, marks=pytest.mark.slow),
        pytest.param("sinks", BOTH, True, marks=pytest.mark.slow),
        pytest.param("capacity", MeshConfig(data=1, expert=2, context=2), True, marks=pytest.mark.slow),
        pytest.param("latent", BOTH, True, marks=pytest.mark.slow),
        pytest.param("sliding", MeshConfig(data=1, model=2), False, marks=pytest.mark.slow),
        pytest.param("chunked", MeshConfig(data=1, fsdp=2, context=2), True, marks=pytest.mark.slow),
        pytest.param("nsa", CONTEXT, True, marks=pytest.mark.slow),
        pytest.param("nsa", MeshConfig(data=1, model=2), False, marks=pytest.mark.slow),
        pytest.param("nsa_wide", CONTEXT, False, marks=pytest.mark.slow),
        pytest.param("nsa_wide", CONTEXT, True, marks=pytest.mark.slow),
        pytest.param("nsa_min_max", BOTH, True, marks=pytest.mark.slow),
        pytest.param("nsa_auxiliary", BOTH, True, marks=pytest.mark.slow),
        pytest.param("nsa_indexer", BOTH, True, marks=pytest.mark.slow),
        pytest.param("nsa_shared", BOTH, True, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_what_one_device_gives(name, mesh, packed):
    compare(name, mesh, packed=packed)


def test_a_stretch_of_a_sequence():
    mesh = make_mesh(CONTEXT)
    x = jax.device_put(jnp.arange(24.0).reshape(2, 12, 1), NamedSharding(mesh, PartitionSpec()))

    def core(tokens, rows, weights, blocks, part: Part):
        assert (part.parts, part.length) == (4, 3)
        assert part.whole(tokens).shape == (2, 12, 1)
        around = part.with_neighbours(tokens, 1, 2)
        after = around[:, 4:] + 100 * jnp.pad(around[:, :1], ((0, 0), (0, 1), (0, 0)))
        check = jnp.sum(jnp.abs(part.whole(tokens) - rows)) + jnp.sum(jnp.abs(part.own(rows) - tokens))
        return jnp.pad(after, ((0, 0), (0, 1), (0, 0))) + check, part.positions(2)[:, None]

    after, positions = jax.jit(on_mesh(lambda x: in_parts(core, x, x, None), mesh))(x)
    expected = np.zeros((2, 12))
    for start in (0, 3, 6):
        expected[:, start : start + 2] = x[:, start + 3 : start + 5, 0]
    for start in (3, 6, 9):
        expected[:, start] += 100 * x[:, start - 1, 0]
    np.testing.assert_array_equal(after[..., 0], expected)
    np.testing.assert_array_equal(positions, np.broadcast_to(np.arange(12), (2, 1, 12)))


@pytest.mark.parametrize("axes", [None, {"data": 1, "model": 1}, {"all": 4}])
def test_without_several_devices_of_our_axes_nothing_happens(axes):
    seen = []
    core = lambda *operands: (operands[0], seen.append(operands[4]))
    run = lambda x: split_tokens(in_parts(core, x, None, None)[0])
    if axes is not None:
        sizes = tuple(axes.values())
        kinds = (AxisType.Auto,) * len(sizes)
        mesh = jax.make_mesh(sizes, tuple(axes), kinds, devices=jax.devices()[: np.prod(sizes)])
        run = on_mesh(run, mesh)
    assert not jax.make_jaxpr(run)(jnp.zeros((4, 8, 2))).eqns
    assert seen == [None]


@pytest.mark.parametrize(
    ("rows", "length", "mesh", "message"),
    [
        (6, 32, MeshConfig(), "a part of 6 sequences cannot be split over 4 devices"),
        (
            4,
            30,
            CONTEXT,
            "mesh.context: sequences of 30 tokens cannot be split over 4 devices; make their length a "
            "multiple of 8 and at least 32, or lower mesh.context",
        ),
        (4, 24, CONTEXT, "of 8 and at least 32, or lower mesh.context"),
    ],
)
def test_batches_that_cannot_be_split(rows, length, mesh, message):
    with pytest.raises(UserError, match=message):
        check_batch(rows, length, MODELS["nsa_wide"], make_mesh(mesh))
    if mesh == CONTEXT:
        moe = replace(MODELS["capacity"].moe, capacity_group=None)
        with pytest.raises(ConfigError, match=r"capacity_group: must be given where sequences are split"):
            check_batch(4, 32, make_config(moe=moe), make_mesh(mesh))
        moe = replace(moe, capacity_group=16)
        with pytest.raises(ConfigError, match=r"make their length a multiple of 64"):
            check_batch(4, 32, make_config(moe=moe), make_mesh(mesh))
    check_batch(8, 32, MODELS["nsa_wide"], make_mesh(mesh))


def test_models_that_cannot_be_split():
    config = make_config(moe=MODELS["capacity"].moe)
    with pytest.raises(
        UserError, match=r"experts axis of 4 cannot be split over 3 devices of mesh axis expert"
    ):
        param_shardings(config, make_mesh(MeshConfig(data=1, expert=3)))
    config = make_config(num_heads=6, num_kv_heads=2, mlp_width=8)
    mesh = make_mesh(MeshConfig(data=1, model=4))
    with pytest.raises(
        UserError, match=r"heads axis of \d cannot be split over 4 devices of mesh axis model"
    ):
        param_shardings(config, mesh)
    run = lambda tokens, context: jax.eval_shape(
        on_mesh(lambda t: forward(draw_params(config), {"tokens": t}, config)[0], make_mesh(context)), tokens
    )
    with pytest.raises(ConfigError, match=r"mesh\.model: 6 heads cannot be split over 4 devices"):
        run(draw_tokens(config, 2, 8), MeshConfig(data=1, model=4))
    with pytest.raises(ConfigError, match=r"mesh\.context: sequences of 6 tokens cannot"):
        run(draw_tokens(config, 2, 6), CONTEXT)


def test_gradients_of_experts_are_scattered_before_they_are_summed():
    """Over `fsdp` each device gets its part alone; the sums over `context` are of these parts."""
    config, mesh = make_config(moe=MoEConfig(num_experts=4, width=5)), make_mesh(MeshConfig(1, 2, context=2))
    axes = logical_axes(config)["layers"]["moe"]

    def placed(leaf, axes):
        spec = partition_spec(tuple(axes)[1:])
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(placed, abstract_params(config)["layers"]["moe"], axes)
    x = placed(jax.ShapeDtypeStruct((1, 4, 8, 12), np.float32), ("layers", "batch", "tokens", "gate"))
    total = lambda params, x: jnp.sum(bind(params, MixtureOfExperts, config, 1.0)(x)[0] ** 2)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    step = jax.jit(on_mesh(jax.grad(total), mesh), out_shardings=places)
    found = read_collectives(step.lower(params, x).compile().as_text(), mesh)
    count = lambda shape, kind, *axes: sum(
        c.times * c.shape.count(shape) for c in found if (c.kind, c.axes) == (kind, axes)
    )
    scattered = [count(f"f32[4,{sizes}]", "reduce-scatter", "fsdp") for sizes in ("6,5", "5,6")]
    assert scattered == [2, 1]
    assert count("f32[4,", "all-reduce", "context") == 3
    assert count("f32[4,", "all-reduce", "fsdp", "context") == 0


def write_config(folder, name, **changes):
    """A run of three steps."""
    (folder / "text.py").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(99)))
    config = {
        "model": asdict(replace(MODELS[name], vocab_size=256, remat="none")),
        "data": {"path": str(folder / "text.py"), "sequence_length": LENGTH, "holdout_every": 4},
        "optimizer": {"warmup_steps": 0, "learning_rate": 0.01},
        "steps": 3,
        "batch_size": 4,
        "log_every": 1,
        "eval_batches": 1,
        **changes,
    }
    (folder / "meshes.yaml").write_text(json.dumps(config))
    return str(folder / "meshes.yaml")


def losses_in(folder):
    (metrics,) = folder.glob("train/meshes-*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]


def test_a_run_on_a_mesh_has_the_losses_of_one_device(tmp_path):
    """Heads over two devices, sequences over two; the losses after each update tell its gradients too."""
    config = write_config(tmp_path, "full")
    found = []
    for number, mesh in enumerate(("{data: 1}", "{data: 1, model: 2, context: 2}")):
        assert main(["train", config, "--mesh", mesh, "--outputs", str(tmp_path / str(number))]) == 0
        found.append(losses_in(tmp_path / str(number)))
    np.testing.assert_allclose(*found, atol=1e-5)
    assert len(found[0]) == 4
    assert found[0][2] < found[0][0] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "nsa"])
def test_run_py_trains_on_eight_devices(name, tmp_path):
    """Examples over two devices, heads over two, sequences over two."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    for number, mesh in enumerate(("{data: 1}", "{data: 2, model: 2, context: 2}")):
        config = write_config(tmp_path, name, accumulation=2)
        command = [sys.executable, ROOT / "run.py", "train", config, "--mesh", mesh]
        run = subprocess.run(
            [*map(str, command), "--outputs", tmp_path / str(number)],
            env=os.environ | {"XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(losses_in(tmp_path / "0"), losses_in(tmp_path / "1"), atol=1e-5)
