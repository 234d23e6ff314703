"""Which cases the Hopper kernels take, and where they may run."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

Implementation = Literal["xla", "mosaic_gpu"]
Place = Literal["device", "interpreter", "compiler"]

MAX_GROUP, MAX_KEY_DIM, MAX_VALUE_DIM, BLOCK = 64, 192, 128, 64
"""Compiled for Hopper without spilled registers up to these head dims."""
OLDEST_JAX = (0, 11, 2)
"""Before, Pallas cannot load a part of a vector into the layout of a matrix product."""
CHECKED_ON_A_GPU = False
"""Until the kernels ran on one, not in the interpreter alone, they run where they are named only."""

_log = logging.getLogger(__name__)
_place: Place = "device"


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in here run in Pallas' GPU interpreter on this machine's CPU: slowly, for tests."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()), _at("interpreter"):
        yield


@contextlib.contextmanager
def compiled_elsewhere() -> Iterator[None]:
    """Kernels may be traced in here without a GPU, to be compiled for one that is described to XLA."""
    with _at("compiler"):
        yield


@contextlib.contextmanager
def _at(place: Place) -> Iterator[None]:
    global _place
    before, _place = _place, place
    try:
        yield
    finally:
        _place = before


def place() -> Place:
    return _place


def reason_against(q: Array, v: Array, keys: int, block_size: int = BLOCK) -> str | None:
    """Why the Hopper kernels cannot take q [B, T, H, Dk], v [B, S, Hkv, Dv]; None if they can."""
    key_dim, value_dim, group = q.shape[3], v.shape[3], q.shape[2] // v.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"wgmma takes bfloat16 and float16 (float32 would be rounded to TF32), not {q.dtype}"
    if key_dim > MAX_KEY_DIM or value_dim > MAX_VALUE_DIM:
        return f"head dims {key_dim}/{value_dim} are above {MAX_KEY_DIM}/{MAX_VALUE_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads share a key/value head; at most {MAX_GROUP} may"
    if block_size % BLOCK:
        return f"block_size {block_size} is no multiple of {BLOCK}"
    if not q.size or not keys:
        return "there are no queries or no keys"
    if jax.__version_info__ < OLDEST_JAX:
        return f"they need jax {'.'.join(map(str, OLDEST_JAX))} or newer, not {jax.__version__}"
    if _place == "device" and not is_hopper():
        return "the default device is no Hopper GPU"
    return None


def uses_kernels(name: Implementation | None, op: str, reason: str | None) -> bool:
    """Whether to run the Hopper kernels. A named implementation is never replaced by another.

    Raises ValueError for an unknown name, NotImplementedError where a named one cannot take the case.
    """
    if name not in (None, "xla", "mosaic_gpu"):
        raise ValueError(f"nsa: implementation must be 'xla', 'mosaic_gpu' or None, not {name!r}")
    if name == "mosaic_gpu":
        if reason is not None:
            raise NotImplementedError(
                f"nsa: {op} with implementation='mosaic_gpu': {reason}; use 'xla' or None"
            )
        return True
    if name is None:
        if reason is None and not CHECKED_ON_A_GPU:
            reason = "the kernels were not checked on a GPU yet; ask for them by name"
        _log.debug("%s runs as %s", op, "mosaic_gpu" if reason is None else f"xla: {reason}")
        return reason is None
    return False


def is_hopper() -> bool:
    """Whether the default device runs the kernels."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"
