"""What kernels that are traced now will run on. Imports no Pallas."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax

Target = Literal["device", "interpreter", "compiler"]

OLDEST_JAX = (0, 11, 2)
"""Of the kernels: before, Pallas cannot load a part of a vector into the layout of a matrix product."""

_target: contextvars.ContextVar[Target] = contextvars.ContextVar("target", default="device")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in here run in Pallas' GPU interpreter on this machine's CPU: slowly, for tests."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()), _traced_for("interpreter"):
        yield


@contextlib.contextmanager
def compiled_elsewhere() -> Iterator[None]:
    """Kernels may be traced in here without a GPU, to be compiled for one that is described to XLA."""
    with _traced_for("compiler"):
        yield


@contextlib.contextmanager
def _traced_for(target: Target) -> Iterator[None]:
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def current_target() -> Target:
    """What kernels that are traced now will run on."""
    return _target.get()


def is_hopper() -> bool:
    """Whether the default device runs the kernels."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"
