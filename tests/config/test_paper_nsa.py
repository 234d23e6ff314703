"""The paper's 27B with NSA: what its configs are, and that a step of each is compiled for its mesh."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from jax.sharding import AbstractMesh

from jaxlab import config as configs
from jaxlab.models import abstract_params, check_batch, count_params, logical_axes
from jaxlab.tasks import train

ROOT = Path(__file__).parents[2]
FOLDER = Path("configs/paper/nsa")
STAGES = ("pretrain_8k", "continue_32k", "sft")


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_the_paper_s_model_on_64_devices(stage):
    config = configs.load(train.Config, ROOT / FOLDER / f"{stage}.yaml")
    model, moe = config.model, config.model.moe
    assert 27e9 < count_params(abstract_params(model)) < 28.5e9
    assert (model.num_layers, model.width, model.num_heads, model.kv_heads) == (30, 2560, 64, 4)
    assert (model.key_dim, model.value_dim, model.nsa.num_blocks, model.nsa.window) == (192, 128, 16, 512)
    assert (moe.num_experts, moe.experts_per_token, moe.shared_width, moe.first_dense) == (
        72,
        6,
        2 * moe.width,
        1,
    )
    mesh = config.mesh
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "context": mesh.context, "expert": mesh.expert}
    assert mesh.data * mesh.fsdp * mesh.model * mesh.context * mesh.expert == 64
    length = config.data.sequence_length
    rows = config.batch_size // config.accumulation
    check_batch(rows, length, model, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    assert length == model.max_length == (8192 if stage == "pretrain_8k" else 32768)
    scaling = ("none", 1.0) if stage == "pretrain_8k" else ("yarn", 4.0)
    assert (model.rope.scaling, model.rope.factor) == scaling


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_check_compiles_a_step_for_all_devices(stage):
    """On a machine without them, and nothing of 27 billion parameters is made."""
    command = [sys.executable, "run.py", "train", str(FOLDER / f"{stage}.yaml"), "--check"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = yaml.safe_load(run.stdout)
    assert 27e9 < found["parameters"] < 28.5e9
    # float32; experts lie over all devices, the rest over fsdp, but for scales and the like, which are whole.
    config = configs.load(train.Config, ROOT / FOLDER / f"{stage}.yaml")
    model, mesh = config.model, config.mesh
    sizes = {True: 0, False: 0}
    axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    for shape, names in zip(jax.tree.leaves(abstract_params(model)), axes, strict=True):
        sizes["experts" in names] += shape.size
    expected = 4 * (sizes[True] / mesh.expert + sizes[False]) / mesh.fsdp
    assert found["bytes_per_device"]["parameters"] == pytest.approx(expected, rel=0.03)
