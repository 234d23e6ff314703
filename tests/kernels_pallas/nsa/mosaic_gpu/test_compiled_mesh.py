"""A training step with the Hopper kernels, compiled for eight H100s without one: data x model x context."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh

from jaxlab.models import ModelConfig, NSAConfig
from jaxlab.models.sharding import batch_shardings, on_mesh
from jaxlab.training.optimizer import OptimizerConfig, make_optimizer
from jaxlab.training.state import abstract_state, state_shardings
from jaxlab.training.step import train_step
from kernels_pallas.nsa.specs import h100
from kernels_pallas.target import compiled_elsewhere

pytestmark = pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or "")

LENGTH = 32768
MODEL = ModelConfig(
    vocab_size=32768,
    width=2048,
    num_layers=4,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    mlp_width=4096,
    max_length=LENGTH,
    attention=NSAConfig(implementation="mosaic_gpu"),
    compute_dtype="bfloat16",
    remat="layer",
)


def collectives(hlo: str) -> dict[str, Counter[str]]:
    """Results of 1 MiB and more on one device, by kind, as often as the text has them: a loop's body once."""
    found: dict[str, Counter[str]] = {}
    call = re.compile(
        r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    )
    for match in filter(None, map(call.search, hlo.splitlines())):
        shapes = re.findall(r"(bf16|f32|s32)\[([\d,]*)\]", match[1])
        if match[3]:  # its operands, then its results
            shapes = shapes[len(shapes) // 2 :]
        bytes_of = lambda dtype, dims: (
            (2 if dtype == "bf16" else 4) * math.prod(int(n) for n in dims.split(",") if n)
        )
        large = [f"{dtype}[{dims}]" for dtype, dims in shapes if bytes_of(dtype, dims) >= 2**20]
        found.setdefault(match[2], Counter()).update(large)
    return found


def test_a_step_on_eight_devices(dump):
    for old in dump.iterdir():
        old.unlink()
    sizes = {"data": 2, "fsdp": 1, "model": 2, "context": 2}
    devices = h100.mesh(8).devices.reshape(*sizes.values())
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * 4)
    optimizer = make_optimizer(OptimizerConfig(), MODEL, 100)
    shardings = state_shardings(MODEL, optimizer, mesh)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    state = jax.tree.map(place, abstract_state(MODEL, optimizer), shardings)
    batch = {"tokens": jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)}
    batch = jax.tree.map(place, batch, batch_shardings(batch, mesh))
    step = functools.partial(train_step, config=MODEL, optimizer=optimizer)
    with compiled_elsewhere():
        update = jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None))
        compiled = update.trace(state, batch).lower(lowering_platforms=("cuda",)).compile()
    kernels, found = h100.kernels_in(dump), collectives(compiled.as_text())
    print(kernels, compiled.memory_analysis(), found, sep="\n")

    assert {kernel.name for kernel in kernels} == {
        "nsa_forward",
        "nsa_choice",
        "nsa_query_gradient",
        "nsa_key_gradients",
    }
    assert not any(kernel.spilled_bytes for kernel in kernels)
    # Gathered are keys and values of selection, and compressed ones, of a device's two heads: in the forward
    # pass and when a layer is recomputed. Gradients go back as stretches. Windows come from neighbours.
    assert found["all-gather"] == {"bf16[32768,2,128]": 2 * 2, "bf16[2048,2,128]": 2 * 2}
    assert found["reduce-scatter"] == {"bf16[1,16384,2,128]": 2}
    # Beside gradients, which are sums over data and context: what heads and hidden units add up to.
    assert found["all-reduce"]["bf16[1,16384,2048]"] >= 5
    # The residual stream goes to the zigzag and back in both passes, a half at a time; rotary tables go once.
    assert set(found["collective-permute"]) == {"bf16[1,8192,2048]", "f32[1,8192,64]"}
    assert "all-to-all" not in found
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**30
