"""A 70B model over eight H100s: the committed figures follow from its shape, and it compiles."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import model_mesh
import pytest
from jax.sharding import AbstractMesh

from jaxlab.costs import bytes_per_device
from jaxlab.models import abstract_params, count_params, param_shardings
from kernels_pallas.nsa.specs import h100

FOUND = json.loads((Path(model_mesh.__file__).with_suffix(".json")).read_text())
ARGUMENTS = model_mesh.Arguments()


@pytest.mark.parametrize("row", FOUND["meshes"], ids=lambda row: str(row["mesh"]))
def test_the_committed_bytes_follow_from_the_shape(row):
    config = model_mesh.LLAMA_70B
    assert FOUND["parameters"] == count_params(abstract_params(config)) == 70_553_706_496
    mesh = AbstractMesh(tuple(row["mesh"].values()), tuple(row["mesh"]))
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=at)
    params = jax.tree.map(place, abstract_params(config), param_shardings(config, mesh))
    assert row["bytes_per_device"]["parameters"] == bytes_per_device(params)
    # Keys and values of 80 layers, 8 texts of 2,304 tokens, 8 heads of 128; lengths and offsets.
    values = 2 * 80 * ARGUMENTS.rows * (ARGUMENTS.prompt + ARGUMENTS.new_tokens) * 8 * 128
    assert 0 <= row["bytes_per_device"]["cache"] - 2 * values // 8 <= 64
    assert row["fits"]


@pytest.mark.slow
@pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or "")
def test_it_compiles_for_eight_h100s():
    devices = h100.mesh(8).devices.reshape(1, 8)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = model_mesh.measured(model_mesh.LLAMA_70B, mesh, ARGUMENTS)
    before = FOUND["meshes"][0]["bytes_per_device"]
    assert {key: found[key] for key in ("parameters", "cache")} == {
        key: before[key] for key in ("parameters", "cache")
    }
    assert found["total"] < 1.2 * before["total"] < model_mesh.DEVICE_BYTES
