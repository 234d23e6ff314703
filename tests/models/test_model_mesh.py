"""A model over several devices: what it generates, measures and becomes is what one device makes of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlab.checkpoints import load_model, open_model, safetensors_file, save_model, sharded_read
from jaxlab.costs import bytes_per_device
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import SplitConfig, forward, generate, init_cache, mesh_of, model_mesh, using
from jaxlab.tasks import main
from tests.checkpoints import folders
from tests.models.tiny import draw_params, make_config

BOTH = {"fsdp": 2, "model": 2}
PROMPTS = {"tokens": np.arange(3, 15, dtype=np.int32).reshape(2, 6)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return folders.make(tmp_path_factory.mktemp("mesh") / "llama3", "llama3")


def held(params):
    """Bytes on each device."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return sizes


@pytest.mark.parametrize("sizes", [BOTH, {"fsdp": 4}, {"model": 2}], ids=str)
def test_each_device_holds_its_part_and_every_byte_is_read_once(llama, sizes, monkeypatch):
    read = []
    whole = safetensors_file.read_into

    def counted(path, array, offset):
        read.append((offset, array.nbytes))
        whole(path, array, offset)

    monkeypatch.setattr(safetensors_file, "read_into", counted)
    mesh = model_mesh(SplitConfig(**sizes))
    opened = open_model(llama)
    params = opened.read(mesh=mesh)
    tensors = opened.stored.tensors.values()
    assert len(read) == len({offset for offset, _ in read}) == len(tensors)
    assert sum(size for _, size in read) == sum(tensor.nbytes for tensor in tensors)
    planned = bytes_per_device(opened.placed(mesh))
    assert {size for size in held(params).values() if size} == {planned}
    assert sum(size > 0 for size in held(params).values()) == mesh.size
    # Everything but norms and what no axis of the mesh splits is cut.
    assert planned < (0.75 if "model" in sizes and "fsdp" not in sizes else 0.55) * bytes_per_device(
        opened.placed(None)
    )
    jax.tree.map(np.testing.assert_array_equal, params, opened.read())


@pytest.mark.parametrize("sizes", [BOTH, {"fsdp": 4}], ids=str)
def test_a_host_reads_the_rows_of_its_own_devices(tmp_path, sizes, monkeypatch):
    """As if this process had the first device alone: matrices whose rows are split are read in part."""
    path = folders.make(tmp_path / "case", "llama_bias" if sizes == {"fsdp": 4} else "llama3")
    mesh = model_mesh(SplitConfig(**sizes))
    opened = open_model(path)
    whole = opened.read(mesh=mesh)
    of_first = lambda leaf: next(s.data for s in leaf.addressable_shards if s.device == jax.devices()[0])
    read, everywhere = [], jax.NamedSharding.addressable_devices_indices_map
    one = lambda self, shape: {d: i for d, i in everywhere(self, shape).items() if d == jax.devices()[0]}
    reading = safetensors_file.read_into

    def counted(file, array, offset):
        read.append(array.nbytes)
        reading(file, array, offset)

    monkeypatch.setattr(safetensors_file, "read_into", counted)
    monkeypatch.setattr(jax.NamedSharding, "addressable_devices_indices_map", one)
    monkeypatch.setattr(sharded_read._Target, "place", lambda target: next(iter(target.buffers.values())))
    parts = opened.read(mesh=mesh)
    jax.tree.map(lambda part, leaf: np.testing.assert_array_equal(part, of_first(leaf)), parts, whole)
    assert sum(read) < 0.85 * sum(tensor.nbytes for tensor in opened.stored.tensors.values())


@pytest.mark.parametrize("case", ["gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_generation_makes_the_same_tokens(tmp_path, case):
    path = folders.make(tmp_path / case, case)
    config, params, _ = load_model(path, mesh=BOTH)
    mesh = mesh_of(BOTH)
    with using(mesh):
        made = generate(params, PROMPTS, config, max_new_tokens=6)
    _, alone, _ = load_model(path)
    np.testing.assert_array_equal(made, generate(alone, PROMPTS, config, max_new_tokens=6))
    run = jax.jit(forward, static_argnames="config")
    with using(mesh):  # without a cache each device runs attention for its heads, sinks among them
        logits = run(params, PROMPTS, config)[0]
    np.testing.assert_allclose(logits, run(alone, PROMPTS, config)[0], atol=1e-5)
    one = jax.tree.leaves(params)[0].sharding
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {one.mesh}


def test_the_cache_is_split_by_examples_and_heads():
    config = make_config()
    with using(mesh_of(BOTH)):
        cache = jax.jit(init_cache, static_argnums=(0, 1, 2))(config, 2, 16)
        keys, values = cache.layers
        of_mesh = PartitionSpec(None, "fsdp", None, "model")
        assert keys.sharding.is_equivalent_to(jax.NamedSharding(keys.sharding.mesh, of_mesh), keys.ndim)
        assert held(values)[jax.devices()[0]] == values.nbytes // 4
        batch = {"tokens": PROMPTS["tokens"] % config.vocab_size}
        run = jax.jit(lambda p, b, c: forward(p, b, config, cache=c)[1]["cache"])
        after = run(draw_params(config), batch, cache).layers[0]
        assert after.sharding.is_equivalent_to(keys.sharding, keys.ndim)
        odd = jax.jit(init_cache, static_argnums=(0, 1, 2))(config, 3, 16).layers[0]  # stays whole
        assert odd.sharding.shard_shape(odd.shape)[1] == 3


def test_a_mesh_of_the_users_own_is_taken(llama):
    for mesh in (jax.make_mesh((4,), ("model",)), jax.make_mesh((2, 2), ("fsdp", "data"))):
        if mesh.axis_names == ("model",):
            with pytest.raises(UserError, match="kv_heads axis of 2 cannot be split over 4 devices"):
                load_model(llama, mesh=mesh)
            continue
        config, params, _ = load_model(llama, mesh=mesh)
        with using(mesh_of(mesh)):
            logits = jax.jit(forward, static_argnames="config")(params, PROMPTS, config)[0]
        _, alone, _ = load_model(llama)
        np.testing.assert_allclose(logits, forward(alone, PROMPTS, config)[0], atol=1e-5)


def test_a_mesh_that_does_not_fit_is_one_line(llama, capsys):
    with pytest.raises(UserError, match="needs 8 devices, 4 are here"):
        load_model(llama, mesh={"fsdp": 8})
    with pytest.raises(UserError, match="the axis 'tensor' is not known; a mesh has data, fsdp, model, cont"):
        load_model(llama, mesh={"tensor": 2})
    with pytest.raises(ConfigError, match="at least 1, or -1 for the rest, is 0"):
        SplitConfig(fsdp=0)
    assert model_mesh(SplitConfig()) is None
    assert model_mesh(SplitConfig(fsdp=-1, model=2)).shape["fsdp"] == 2
    assert main(["convert", str(llama), str(llama.parent / "out"), "--mesh.model", "4", "--check"]) == 2
    assert f"{llama}: layers.attention.key: its kv_heads axis of 2 cannot" in capsys.readouterr().err


def run_task(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_check_tells_the_bytes_of_a_device(tmp_path, capsys):
    model = make_config(vocab_size=256, max_length=64)
    save_model(tmp_path / "model", model, draw_params(model))
    words = ["generate", str(tmp_path / "model"), "--prompt", "abcd", "--max_new_tokens", "12", "--check"]
    number = lambda text, what: int(re.search(rf"{what} ([\d,]+)", text)[1].replace(",", ""))
    alone = run_task(capsys, *words)
    split = run_task(capsys, *words, "--mesh.fsdp", "2", "--mesh.model", "2")
    size = bytes_per_device(open_model(tmp_path / "model").placed(model_mesh(SplitConfig(**BOTH))))
    assert number(split, "parameters") == size < 0.55 * number(alone, "parameters")
    cache = model.num_layers * 16 * model.kv_heads * (model.key_dim + model.value_dim) * 4
    assert 0 <= number(alone, "cache") - cache <= 64
    assert 0 <= number(split, "cache") - cache // 2 <= 64  # one text is not split
    assert number(split, "total") < number(alone, "total")


def test_convert_writes_the_same_bytes(llama, tmp_path, capsys):
    both = ["--mesh.fsdp", "2", "--mesh.model", "2"]
    said = run_task(capsys, "convert", str(llama), str(tmp_path / "ours"), "--verify", *both)
    assert "verified: all " in said
    assert "verified: logits differ by at most 0 " in said
    run_task(capsys, "convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--mesh.fsdp", "4")
    for name, values in folders.read_all(llama).items():
        np.testing.assert_array_equal(folders.read_all(tmp_path / "theirs")[name], values)
    alone = run_task(capsys, "convert", str(llama), str(tmp_path / "x"), "--check")
    split = run_task(capsys, "convert", str(llama), str(tmp_path / "x"), "--check", "--mesh.fsdp", "4")
    size = lambda text: int(text.split(" bytes per device")[0].split()[-1].replace(",", ""))
    assert size(split) < 0.55 * size(alone)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_on_eight_devices():
    """Generation, evaluation, flows and conversion, each on one device and over 4 x 2."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    script = Path(__file__).with_name("on_eight_devices.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["same_tokens"]
    assert found["evaluate"] < 1e-5
    assert found["flows"] < 1e-4
    assert found["answers"] == 0
    assert found["converted"]
    assert found["bytes"] == found["planned"]
    assert len(found["bytes"]) == 8
