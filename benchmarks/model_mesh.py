"""Bytes on each device of a model that one device does not hold, compiled for H100s without one.

    JAX_PLATFORMS=cpu python benchmarks/model_mesh.py --out benchmarks/model_mesh.json

Needs the extra `gpu-compile`. The shape is Llama 3.1 70B's, in bfloat16, its parameters abstract: reading
prompts and one step of decoding are compiled for each mesh, and the compiler's plan is told: bytes of
parameters, of the cache and of temporary memory, those that `generate --check` prints. Nothing was run.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, Mesh
from shapes import LLAMA_70B

from jaxlab.app.provenance import environment
from jaxlab.costs import generation_memory
from jaxlab.files import write_json
from jaxlab.models import ModelConfig, abstract_params, count_params, param_shardings, using
from kernels_pallas.nsa.specs import h100

DEVICE_BYTES = 80 * 10**9
"""Of an H100."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile."""

    out: Path | None = None
    """JSON file to write."""
    meshes: tuple[tuple[int, int], ...] = ((1, 8), (2, 4), (8, 1))
    """Sizes of fsdp and model; their product is the number of devices."""
    rows: int = 8
    """Texts that are read together."""
    prompt: int = 2048
    """Tokens of each."""
    new_tokens: int = 256
    """Tokens that are made."""


def measured(config: ModelConfig, mesh: Mesh, arguments: Arguments) -> dict[str, Any]:
    """Bytes on one device, by what holds them."""
    shapes, where = abstract_params(config), param_shardings(config, mesh)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=at)
    params = jax.tree.map(place, shapes, where)
    with using(mesh):
        return generation_memory(params, config, arguments.rows, arguments.prompt, arguments.new_tokens)


def main(arguments: Arguments) -> None:
    if (missing := h100.missing()) is not None:
        raise SystemExit(missing)
    rows = []
    for fsdp, model in arguments.meshes:
        sizes = {"fsdp": fsdp, "model": model}
        devices = h100.mesh(fsdp * model).devices.reshape(*sizes.values())
        mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * 2)
        started = time.perf_counter()
        found = measured(LLAMA_70B, mesh, arguments)
        row = {"mesh": sizes, "bytes_per_device": found, "fits": found["total"] < DEVICE_BYTES}
        rows.append({**row, "seconds_to_compile": time.perf_counter() - started})
        told = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in found.items())
        print(f"{sizes}: {told}")
    results = {
        "arguments": dataclasses.asdict(arguments) | {"out": str(arguments.out and arguments.out.name)},
        "environment": environment(),
        "device": "NVIDIA H100 SXM 80 GB, compiled for, not run",
        "parameters": count_params(abstract_params(LLAMA_70B)),
        "meshes": rows,
    }
    if arguments.out is not None:
        write_json(arguments.out, results)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
