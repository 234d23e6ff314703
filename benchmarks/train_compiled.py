"""A training step of a config, compiled for H100s without one: memory of a device, exchanges, kernels.

    JAX_PLATFORMS=cpu python benchmarks/train_compiled.py configs/paper/nsa/pretrain_8k.yaml --out report.json

Needs the extra `gpu-compile`. Nothing is run and no parameter is made; the data set is not read. Devices are
those of the config's mesh, eight a host. With `--layers` fewer layers of the same shapes are compiled, and
what a layer adds is told by the difference of two such reports.
"""

import dataclasses
import functools
import json
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
from jaxlab.costs import by_kind, bytes_per_device, read_collectives
from jaxlab.files import write_json
from jaxlab.models import batch_shardings, check_batch, count_params, on_mesh
from jaxlab.training import TrainConfig, abstract_state, make_optimizer, state_shardings, train_step
from kernels_pallas.nsa.specs import h100
from kernels_pallas.target import compiled_elsewhere

DEVICE_BYTES = 80 * 10**9
"""Of an H100."""
A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile."""

    config: tyro.conf.Positional[Path]
    """A config of task `train`, its mesh without -1."""
    out: Path | None = None
    """JSON file in which the report is written under the config's name; others in it stay."""
    layers: int | None = None
    """Layers in place of the config's."""
    kernels: bool = True
    """NSA by the kernels for Hopper, experts by the ragged exchange; else as on a CPU."""
    hlo: Path | None = None
    """Where the optimised program's text goes."""
    set: tuple[str, ...] = ()
    """Other fields of the config, as `mesh.fsdp=4`."""


def for_hopper(config: TrainConfig) -> TrainConfig:
    """What `auto` would take there."""
    model = config.model
    if model.attention.kind == "nsa":
        attention = dataclasses.replace(model.nsa, implementation="mosaic_gpu")
        model = dataclasses.replace(model, attention=attention)
    if model.moe is not None:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, exchange="ragged"))
    return dataclasses.replace(config, model=model)


def step_report(config: TrainConfig, dump: Path, hlo: Path | None = None) -> dict[str, Any]:
    """Bytes on one device, exchanges of a step, and kernels."""
    sizes = dataclasses.asdict(config.mesh)
    count = 1
    for size in sizes.values():
        count *= size
    devices = h100.mesh(count, max(1, count // A_HOST)).devices.reshape(*sizes.values())
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    rows, length = config.batch_size, config.data.sequence_length
    check_batch(rows // config.accumulation, length, config.model, mesh)
    optimizer = make_optimizer(config.optimizer, config.model, config.steps)
    shardings = state_shardings(config.model, optimizer, mesh)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    state = jax.tree.map(place, abstract_state(config.model, optimizer), shardings)
    # What packed documents are; the data set itself is not read.
    kinds = {"tokens": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct((rows, length), kind) for name, kind in kinds.items()}
    batch = jax.tree.map(place, batch, batch_shardings(batch, mesh))
    step = functools.partial(
        train_step, config=config.model, optimizer=optimizer, accumulation=config.accumulation
    )
    started = time.perf_counter()
    with compiled_elsewhere():
        update = jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None))
        compiled = update.trace(state, batch).lower(lowering_platforms=("cuda",)).compile()
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if hlo is not None:
        hlo.write_text(text)
    found = read_collectives(text, mesh)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = held + memory.temp_size_in_bytes
    return {
        "mesh": sizes,
        "layers": config.model.num_layers,
        "parameters": count_params(state.params),
        "tokens_per_step": rows * length,
        "bytes_per_device": {
            "parameters": bytes_per_device(state.params),
            "optimizer": bytes_per_device(state.optimizer),
            "temporary": memory.temp_size_in_bytes,
            "total": total,
        },
        "fits": total < DEVICE_BYTES,
        "collectives": by_kind(found),
        "largest": [{**row._asdict(), "axes": "+".join(row.axes)} for row in found[:40]],
        "kernels": [dataclasses.asdict(kernel) for kernel in h100.kernels_in(dump)],
        "seconds_to_compile": round(seconds, 1),
    }


def main(arguments: Arguments) -> None:
    if (missing := h100.missing()) is not None:
        raise SystemExit(missing)
    words = [word for pair in arguments.set for word in (f"--{pair.split('=')[0]}", pair.split("=", 1)[1])]
    config = load(TrainConfig, arguments.config, words)
    if arguments.kernels:
        config = for_hopper(config)
    name = arguments.config.stem
    if arguments.layers is not None:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, num_layers=arguments.layers)
        )
        name += f", {arguments.layers} layers"
    with tempfile.TemporaryDirectory() as folder:
        h100.dump_to(Path(folder))
        report = step_report(config, Path(folder), arguments.hlo)
    for what, size in report["bytes_per_device"].items():
        print(f"{what}: {size / 1e9:.2f} GB")
    for row in report["collectives"]:
        sums = f"{row['times']} times, {row['bytes'] / 1e9:.2f} GB, at most {row['largest'] / 1e6:.0f} MB"
        print(f"{row['kind']} over {row['axes']}: {sums}")
    if arguments.out is not None:
        old = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        report |= {"set": list(arguments.set), "environment": environment()}
        device = "NVIDIA H100 SXM 80 GB, compiled for, not run"
        write_json(arguments.out, {**old, "device": device, name: report})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(tyro.cli(Arguments))
