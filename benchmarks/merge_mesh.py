"""Merging on a mesh of H100s, compiled without one: what devices send each other, and what they hold.

    JAX_PLATFORMS=cpu python benchmarks/merge_mesh.py --out benchmarks/merge_mesh.json

Needs the extra `gpu-compile`. The shape is Llama 3.1 70B's, in bfloat16, its parameters abstract. One program
merges one leaf (of all layers) of two models and their base, as `merge_models` does; the largest kinds of
leaves are compiled. An operator that works element by element sends nothing; one that needs to know where a
tensor is cut sends counts, and the largest thing gathered is a sample of a thousand values for each tensor.
Nothing was run.
"""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh
from shapes import LLAMA_70B

from jaxlab.app.provenance import environment
from jaxlab.checkpoints import entries, leaf_at, tree_of
from jaxlab.files import write_json
from jaxlab.merging import tensor_key
from jaxlab.merging.merge import merge_entry_program, placement_of
from jaxlab.models import abstract_params, param_shardings
from kernels_pallas.nsa.specs import h100

OPERATORS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "dare_linear": {"density": 0.5},
    "ties": {"density": 0.2},
}
PATTERNS = ("embed_tokens", "q_proj", "o_proj", "down_proj", "input_layernorm")
"""Leaves of each way of lying on a mesh."""
SENT = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile."""

    out: Path | None = None
    """JSON file to write."""
    meshes: tuple[tuple[int, int], ...] = ((2, 4),)
    """Sizes of fsdp and model; their product is the number of devices."""
    operators: tuple[str, ...] = tuple(OPERATORS)
    """Which operators."""


def elements(shape: str) -> int:
    """Of the largest array in a type as HLO writes it."""
    sizes = [
        np.prod([int(n) for n in dims.split(",") if n], dtype=int)
        for dims in re.findall(r"\[([\d,]*)\]", shape)
    ]
    return int(max(sizes, default=1))


def measured(operator: str, mesh: Mesh) -> list[dict[str, Any]]:
    """A row for each leaf."""
    shapes, where = abstract_params(LLAMA_70B), param_shardings(LLAMA_70B, mesh)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=at)
    params = jax.tree.map(place, shapes, where)
    rows = []
    for entry in entries(shapes, "llama"):
        if not any(part in entry.pattern for part in PATTERNS):
            continue
        leaf = tree_of({path: leaf_at(params, path) for path in entry.paths})
        keys = jnp.asarray(np.stack([tensor_key(0, name) for name in entry.names]))
        own = {"key": keys, "layer": jnp.zeros(len(entry.names), jnp.int32), "statistics": None}
        with_base = operator != "linear"
        options = {"mode": "paper", "weight": [0.9, 0.4], **OPERATORS[operator]}
        program = merge_entry_program(operator, options, entry, with_base, placement_of(leaf))
        began = time.perf_counter()
        traced = program.trace([leaf] * (3 if with_base else 2), own, np.uint32(0))
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        memory, sent = compiled.memory_analysis(), {}
        for shape, name in re.findall(SENT, compiled.as_text()):
            found = sent.setdefault(name, {"count": 0, "largest_elements": 0})
            found["count"] += 1
            found["largest_elements"] = max(found["largest_elements"], elements(shape))
        rows.append(
            {
                "leaf": entry.pattern,
                "tensors": len(entry.names),
                "input_bytes": memory.argument_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "sent": sent,
                "seconds_to_compile": time.perf_counter() - began,
            }
        )
        print(operator, rows[-1], flush=True)
    return rows


def main(arguments: Arguments) -> None:
    if (missing := h100.missing()) is not None:
        raise SystemExit(missing)
    results = []
    for fsdp, model in arguments.meshes:
        sizes = {"fsdp": fsdp, "model": model}
        devices = h100.mesh(fsdp * model).devices.reshape(*sizes.values())
        mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * 2)
        results += [
            {"mesh": sizes, "operator": name, "leaves": measured(name, mesh)} for name in arguments.operators
        ]
    record = {
        "device": "NVIDIA H100 SXM 80 GB, compiled for, not run; bytes are of one device",
        "results": results,
        "environment": environment(),
    }
    if arguments.out is not None:
        write_json(arguments.out, record)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
