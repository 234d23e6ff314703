"""Merges of models that lie on several devices: the bits of the host's merge, placed as the models are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.checkpoints import open_model
from jaxlab.config import build
from jaxlab.errors import UserError
from jaxlab.merging import MergeRecipe, merge_on_mesh
from jaxlab.merging.numerics import largest, order_statistic
from jaxlab.models.sharding import MeshConfig, make_mesh
from tests.merging.on_mesh import differences
from tests.merging.test_engine import llama

OPERATORS = [
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "ram",
    "magmax", "consensus_ta", "layer_swap", "nearswap", "model_stock", "slerp", "sce", "ties_global", "expo",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        llama(folder / name, seed)
    return folder


def test_on_four_devices(place):
    found = differences(place, ["ties"], (2, 2))
    assert found == {"ties inject": [], "ties merge": []}


@pytest.mark.slow
def test_every_operator_on_eight_devices(place):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", "tests.merging.on_mesh", str(place), *OPERATORS],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > len(OPERATORS)
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def collectives(function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return {name for name in ("all-gather", "all-to-all", "collective-permute") if f" {name}" in text}


def test_a_sharded_tensor_is_not_gathered():
    """Neither by thresholds nor by order statistics; split along either axis."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    x = np.random.default_rng(0).standard_normal((256, 192)).astype(np.float32)
    x[::3] = np.round(x[::3], 1)  # equal ones
    where = NamedSharding(mesh, PartitionSpec("a", "b"))
    y = jax.device_put(x, where)
    for count in (1, 20000):
        np.testing.assert_array_equal(largest(y, count), largest(jnp.asarray(x), count))
        assert float(order_statistic(y, count)) == np.sort(x, axis=None)[count]
    sample = {"all-gather"}  # of a thousand values
    text = jax.jit(lambda x: largest(x, 20000)).lower(y).compile().as_text()
    for line in text.splitlines():
        if " all-gather(" in line:
            shape = line.split("[")[1].split("]")[0]
            assert np.prod([int(n) for n in shape.split(",")]) <= 2048, line
    assert collectives(lambda x: largest(x, 20000), y) <= sample


def test_what_only_a_plan_can_do_is_refused(place):
    models = [{"model": str(place / "one"), "weight": [0.1, 0.9]}, {"model": str(place / "two")}]
    recipe = build(MergeRecipe, {"models": models, "base": str(place / "base")})
    opened = [open_model(reference) for reference in recipe.references()]
    with pytest.raises(UserError, match="weight is not the same for all tensors"):
        merge_on_mesh(recipe, opened, make_mesh(MeshConfig(fsdp=2, model=2)))
