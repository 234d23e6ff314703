"""Versions, and the two rates that bound every kernel: a copy and a matrix product, on random numbers."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
from first_contact_parts.steps import Item, Row
from nsa_parts import timing

from kernels_pallas.nsa import records

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "numpy",
    "torch",
    "triton",
    "flax",
    "jaxtyping",
    "nvidia-cudnn-cu13",
)


def items(options: dict[str, Any], part: str) -> list[Item]:
    elements, size = (1 << 16, 64) if options["tiny"] else (1 << 31, 8192)
    seen = Item("versions", lambda: None, lambda _: [{"name": "versions", "fact": versions()}])
    platform = jax.devices()[0].platform
    if platform != "gpu" and not options["tiny"]:
        why = f"jax sees no GPU here, only {platform}; --tiny is a dry run without one"
        none = Item("GPU", lambda: None, lambda _: [{"name": "GPU", "failed": why, "stop": why}])
        return [seen, none]
    return [
        seen,
        Item("copy", functools.partial(_copy, elements), _run_copy),
        Item("bf16 product", functools.partial(_product, size), _run_product),
    ]


def versions() -> Row:
    """Of what may matter."""
    device = jax.devices()[0]
    found: Row = {
        "python": platform.python_version(),
        "device_kind": device.device_kind,
        "cpus": os.cpu_count(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["compute_capability"] = str(getattr(device, "compute_capability", ""))
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        found |= dict(zip(("driver", "memory", "clock"), answer.strip().split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        found["driver"] = f"unknown ({type(error).__name__})"
    return found | {"kernels": records.kernels_hash()}


def _compiled(function: Any, *args: Any) -> tuple[Any, list[Any]]:
    return jax.jit(function).lower(*args).compile(), list(args)


def _copy(elements: int) -> tuple[Any, list[Any]]:
    return _compiled(jnp.negative, jax.ShapeDtypeStruct((elements,), jnp.bfloat16))


def _run_copy(built: tuple[Any, list[Any]]) -> list[Row]:
    call, (like,) = built
    x = jax.random.normal(jax.random.key(0), (min(like.size, 1 << 24),), jnp.bfloat16)
    x = jnp.tile(x, like.size // x.size)
    seconds = timing.measure(call, [(x,)], 20, 0.5)["median_s"]
    rate = 2 * 2 * like.size / seconds
    return [
        {
            "name": f"copy, {2 * like.size / 1e9:.1f} GB",
            "seconds": seconds,
            "fact": {"copy_bytes_per_s": rate},
        }
    ]


def _product(size: int) -> tuple[Any, list[Any]]:
    like = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return _compiled(jnp.matmul, like, like)


def _run_product(built: tuple[Any, list[Any]]) -> list[Row]:
    call, (like, _) = built
    pair = tuple(jax.random.normal(jax.random.key(i), like.shape, like.dtype) for i in (0, 1))
    seconds = timing.measure(call, [pair], 20, 0.5)["median_s"]
    rate = 2 * like.shape[0] ** 3 / seconds
    name = f"bf16 product, {like.shape[0]} x {like.shape[0]}"
    return [{"name": name, "seconds": seconds, "fact": {"product_flops_per_s": rate}}]
