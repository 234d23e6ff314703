"""Tile sizes of the Hopper kernels, by device: the data files beside this one, by benchmarks/nsa_tune.py."""

import contextlib
import contextvars
import functools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from kernels_pallas.hopper import FEATURES
from kernels_pallas.nsa.base import ceil_div
from kernels_pallas.nsa.mosaic_gpu.common import Tuning

Kernel = Literal["forward", "query_gradient", "key_gradients", "scores"]
Branch = Literal["compression", "selection", "window", "block_selection"]
COMPILED_FOR = "NVIDIA H100 80GB HBM3"
"""The device that kernels are compiled for where there is none."""
FOLDER = Path(__file__).parent

_forced: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("forced", default={})  # noqa: B039


@contextlib.contextmanager
def forced(**sizes: Any) -> Iterator[None]:
    """Kernels traced in here have these fields of `Tuning`, whatever is best for their device."""
    token = _forced.set(sizes)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_sizes() -> dict[str, Any]:
    return _forced.get()


_log = logging.getLogger(__name__)


def file_of(device_kind: str) -> Path:
    """Where the sizes for a device are or would be."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_')}.json"


def padded(dim: int) -> int:
    """Head dim as the kernels see it."""
    return ceil_div(dim, FEATURES) * FEATURES


@functools.lru_cache(maxsize=1024)
def tuned(device_kind: str, kernel: Kernel, branch: Branch, key_dim: int, value_dim: int) -> Tuning:
    """Sizes for a kernel of a branch; those of `Tuning` where the device or the head dims have no entry,
    which is told at level DEBUG. "scores" has the branch "block_selection" and no values: both its dims are
    the keys'.
    """
    wanted = (kernel, branch, padded(key_dim), padded(value_dim))
    for entry in _entries(file_of(device_kind)):
        if tuple(entry[name] for name in ("kernel", "branch", "key_dim", "value_dim")) == wanted:
            return Tuning(**entry["tuning"])
    _log.debug("no tile sizes for %s of %s at %d/%d on %s: the defaults", *wanted, device_kind)
    return Tuning()


@functools.lru_cache(maxsize=8)
def _entries(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()
