"""Compiling for H100s without one: what XLA and ptxas say of kernels and memory. Nothing runs.

Needs the extra `gpu-compile`.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing() -> str | None:
    """Why nothing can be compiled for an H100 here; None if it can. Puts ptxas on the PATH."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "the CUDA plugin is not installed: pip install -e '.[gpu-compile]'"
    if shutil.which("ptxas") is None:
        spec = importlib.util.find_spec("nvidia")
        roots = [] if spec is None else spec.submodule_search_locations or []
        folders = [Path(root) / "cu13" / "bin" for root in roots]
        found = next((folder for folder in folders if (folder / "ptxas").exists()), None)
        if found is None:
            return "ptxas is not installed: pip install -e '.[gpu-compile]'"
        os.environ["PATH"] = f"{found}{os.pathsep}{os.environ['PATH']}"
    return None


SHARED_BYTES, BARRIER_BYTES = 232448, 8
"""Shared memory that one block may have; what a barrier takes of it."""


def dump_to(folder: Path) -> None:
    """Where reports of kernels go; read from the environment when the first kernel is compiled."""
    flags = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
    os.environ |= {**flags, "MOSAIC_GPU_DUMP_TO": str(folder)}


@functools.cache
def mesh(devices: int = 1, hosts: int = 1) -> Mesh:
    """Abstract H100s, as many on each host."""
    jax.devices()  # the CPU's backend has to be there first
    topology = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=_DEVICE, topology=f"1x{hosts}x{devices // hosts}"
    )
    return Mesh(np.array(topology.devices), ("x",))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    kernels: tuple[Kernel, ...]
    argument_bytes: int
    temporary_bytes: int
    compiled: Any = dataclasses.field(repr=False)


def compile_for_h100(function: Callable[..., Any], *args: Any, dump: Path) -> Report:
    """Compile for one H100; `dump` is a folder that was given to `dump_to` before the first kernel."""
    for old in dump.iterdir():
        old.unlink()
    here = NamedSharding(mesh(), PartitionSpec())
    compiled = (
        jax.jit(function, in_shardings=here, out_shardings=here)
        .trace(*args)
        .lower(lowering_platforms=("cuda",))
        .compile()
    )
    memory = compiled.memory_analysis()
    return Report(kernels_in(dump), memory.argument_size_in_bytes, memory.temp_size_in_bytes, compiled)


def kernels_in(dump: Path) -> tuple[Kernel, ...]:
    return tuple(_read(path) for path in sorted(dump.glob("*.ptxas")))


def _read(path: Path) -> Kernel:
    log, resources = path.read_text(), path.with_suffix(".resources.txt").read_text()
    name = re.search(r"entry function '([^']+)'", log)
    registers = re.search(r"Used (\d+) registers", log)
    scratch = re.search(r"smem_scratch_bytes=(\d+)", resources)
    assert name is not None, log
    assert registers is not None, log
    assert scratch is not None, resources
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
    shared = int(scratch.group(1)) + sum(BARRIER_BYTES * int(n) * int(times) for n, times in barriers)
    name_of_op = name.group(1).removesuffix("_mosaic_gpu_kernel")
    return Kernel(name_of_op, int(registers.group(1)), spilled, shared)
