"""A training step of a config, compiled for H100s without one: memory of a device, exchanges, kernels.

    JAX_PLATFORMS=cpu python benchmarks/train_compiled.py configs/train/nsa_1b.yaml --out report.json

Needs the extra `gpu-compile`. Nothing is run, no parameter is made, no data set read. Devices are those of a
config's mesh, eight a host.
"""

import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, Mesh

from jaxlab.app.provenance import environment
from jaxlab.config import load
from jaxlab.costs import (
    PEAK_FLOPS,
    by_kind,
    bytes_per_device,
    planned_memory,
    read_collectives,
    train_flops_per_token,
)
from jaxlab.files import write_json
from jaxlab.models import NSAConfig, batch_shardings, check_batch, count_params, on_mesh
from jaxlab.training import TrainConfig, abstract_state, make_optimizer, state_shardings, train_step
from kernels_pallas.nsa.specs import h100
from kernels_pallas.target import compiled_elsewhere

DEVICE_BYTES = 80 * 10**9
"""Of an H100."""
A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile."""

    configs: tyro.conf.Positional[tuple[Path, ...]]
    """Configs of task `train`, their meshes without -1."""
    out: Path | None = None
    """JSON file in which each report is written under its config's name; others in it stay."""
    fields: tuple[str, ...] = ()
    """Other fields of the configs, as `model.num_layers=2`."""
    hlo: Path | None = None
    """Where the optimised program's text goes."""


def on_hopper(config: TrainConfig) -> TrainConfig:
    """With the kernels that `auto` takes there."""
    attention = config.model.attention
    if not isinstance(attention, NSAConfig):
        return config
    attention = dataclasses.replace(attention, implementation="mosaic_gpu")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))


def report(config: TrainConfig, dump: Path, hlo: Path | None = None) -> dict[str, Any]:
    """Bytes on one device, exchanges of a step, and kernels."""
    for old in dump.iterdir():
        old.unlink()
    sizes = dataclasses.asdict(config.mesh)
    count = math.prod(sizes.values())
    devices = h100.mesh(count, max(1, count // A_HOST)).devices.reshape(*sizes.values())
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    model, rows, length = config.model, config.batch_size, config.data.sequence_length
    check_batch(rows // config.accumulation, length, model, mesh)
    optimizer = make_optimizer(config.optimizer, model, config.steps)
    shardings = state_shardings(model, optimizer, mesh)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    state = jax.tree.map(place, abstract_state(model, optimizer), shardings)
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct((rows, length), jnp.bool_),
    }
    batch = jax.tree.map(place, batch, batch_shardings(batch, mesh))
    step = functools.partial(train_step, config=model, optimizer=optimizer, accumulation=config.accumulation)
    started = time.perf_counter()
    with compiled_elsewhere():
        update = jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None))
        compiled = update.trace(state, batch).lower(lowering_platforms=("cuda",)).compile()
    seconds, text = time.perf_counter() - started, compiled.as_text()
    if hlo is not None:
        hlo.write_text(text)
    found = read_collectives(text, mesh)
    planned = planned_memory(compiled)
    flops = train_flops_per_token(model, length) * rows * length
    return {
        "mesh": sizes,
        "layers": model.num_layers,
        "parameters": count_params(state.params),
        "tokens_per_step": rows * length,
        "bytes_per_device": {
            "parameters": bytes_per_device(state.params),
            "optimizer": bytes_per_device(state.optimizer),
            **planned,
            "peak": compiled.memory_analysis().peak_memory_in_bytes,
        },
        "fits": planned["total"] < DEVICE_BYTES,
        "collectives": by_kind(found),
        "largest": [row._asdict() for row in found[:40]],
        "kernels": [dataclasses.asdict(kernel) for kernel in h100.kernels_in(dump)],
        "flops_per_step": flops,
        "seconds_per_step_at_mfu_0.4": flops / (0.4 * PEAK_FLOPS["H100"] * count),
        "seconds_to_compile": round(seconds, 1),
    }


def show(name: str, found: dict[str, Any]) -> None:
    axes = {axis: size for axis, size in found["mesh"].items() if size > 1}
    print(
        f"{name}: {found['parameters'] / 1e9:.2f} G parameters, {found['tokens_per_step']:,} tokens, {axes}"
    )
    print("  " + ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in found["bytes_per_device"].items()))
    for row in found["collectives"]:
        print(
            f"  {row['kind']} over {row['axes']}: {row['times']} times, {row['bytes'] / 1e9:.3f} GB, "
            f"the largest {row['largest'] / 1e6:.1f} MB"
        )
    for row in found["kernels"]:
        print(f"  {row['name']}: {row['registers']} registers, {row['spilled_bytes']} bytes spilled")


def main(arguments: Arguments) -> None:
    if (missing := h100.missing()) is not None:
        raise SystemExit(missing)
    words = [word for field in arguments.fields for word in ("--" + field).split("=", 1)]
    with tempfile.TemporaryDirectory() as folder:
        h100.dump_to(Path(folder))
        for path in arguments.configs:
            found = report(on_hopper(load(TrainConfig, path, words)), Path(folder), arguments.hlo)
            show(path.stem, found)
            if arguments.out is not None:
                old = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
                found |= {"fields": list(arguments.fields), "environment": environment()}
                device = "NVIDIA H100 SXM 80 GB, compiled for, not run"
                write_json(arguments.out, {**old, "device": device, path.stem: found})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(tyro.cli(Arguments))
