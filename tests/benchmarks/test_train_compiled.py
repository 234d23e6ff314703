"""Training steps compiled for H100s: what the committed figures say, and a small step compiled here."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import pytest
import train_compiled

from jaxlab.config import load
from jaxlab.models import MeshConfig, NSAConfig, abstract_params, count_params
from jaxlab.training import TrainConfig
from kernels_pallas.nsa.specs import h100

ROOT = Path(__file__).parents[2]
FOUND = json.loads(Path(train_compiled.__file__).with_suffix(".json").read_text())
STACKED = ("layers", "dense_layers")


def config_of(name):
    return load(TrainConfig, ROOT / "configs" / "train" / f"{name}.yaml")


def parameter_sizes(model):
    """Elements of every parameter, of one layer where layers are stacked."""
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model)):
        stacked = str(path[0].key) in STACKED
        found.add(math.prod(leaf.shape[1:]) if stacked else leaf.size)
    return found


def surprises(rows, config):
    """All-gathers of something large that is no parameter: activations, or all layers at once."""
    sizes = parameter_sizes(config.model)
    found = []
    for row in rows:
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", row["shape"]):
            size = math.prod(int(n) for n in dims.split(",") if n)
            if row["kind"] == "all-gather" and dtype != "s32" and size > 1 << 14 and size not in sizes:
                found.append(f"{dtype}[{dims}]")
    return found


@pytest.mark.parametrize("name", ["nsa_1b", "nsa_7b"])
def test_the_committed_steps_fit_and_exchange_weights_alone(name):
    found, config = FOUND[name], config_of(name)
    assert found["parameters"] == count_params(abstract_params(config.model))
    assert found["tokens_per_step"] == config.batch_size * config.data.sequence_length
    assert found["mesh"] == dataclasses.asdict(config.mesh)
    assert found["bytes_per_device"]["total"] < train_compiled.DEVICE_BYTES
    assert found["fits"]
    assert not any(kernel["spilled_bytes"] for kernel in found["kernels"])
    assert surprises(found["largest"], config) == []
    planted = {"kind": "all-gather", "shape": "bf16[8,8192,4096]"}
    assert surprises([planted], config) == ["bf16[8,8192,4096]"]
    if name == "nsa_1b":
        assert found["collectives"] == []
        return
    sums = {row["kind"]: row for row in found["collectives"]}
    assert {row["axes"] for row in found["collectives"]} == {"fsdp"}
    # Of each of the parts of a batch: weights in 16 bits forward and where a layer is computed again, and the
    # gradients once; what is more than that is small.
    parts, weights = config.accumulation, 2 * found["parameters"]
    assert 1.9 * parts * weights < sums["all-gather"]["bytes"] < 2.1 * parts * weights
    assert sums["reduce-scatter"]["bytes"] < 1.1 * parts * weights
    assert sums["all-reduce"]["bytes"] < 0.01 * parts * weights
    # Rows of the embedding, which is split by the width, there and back.
    assert sums["all-to-all"]["times"] == 2 * parts
    assert sums["all-to-all"]["bytes"] < 0.01 * parts * weights


@pytest.mark.slow
@pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or "")
def test_a_small_step_on_four_h100s(tmp_path):
    config = config_of("nsa_7b")
    model = dataclasses.replace(
        config.model,
        num_layers=2,
        width=1024,
        num_heads=16,
        num_kv_heads=1,
        mlp_width=2048,
        max_length=2048,
        attention=NSAConfig(implementation="xla"),
    )
    config = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, sequence_length=2048),
        mesh=MeshConfig(data=1, fsdp=4),
        batch_size=4,
        accumulation=1,
    )
    found = train_compiled.step_report(config, tmp_path)
    assert found["fits"]
    assert surprises(found["largest"], config) == []
    assert {"all-gather", "reduce-scatter"} <= {row["kind"] for row in found["collectives"]}
