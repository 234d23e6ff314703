"""What a merge takes, told before it begins: bytes, memory, time, room on the disk."""

import math
import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlab.errors import UserError
from jaxlab.merging.preparing import Prepared

if TYPE_CHECKING:
    from jaxlab.checkpoints import Planned

_BASE_MEMORY = 350 << 20
"""Bytes that Python and jax take."""
_BYTES_A_SECOND = {
    "element": 1.5e9,
    "cut": 800e6,
    "row": 150e6,
    "tensor": 150e6,
    "matrix": 600e6,
    "model": 600e6,
}
"""Read and written, by what an element depends on: about what two cores do. What matrices take besides is
told by `matrix_work`."""
_CORES = 2


@dataclass(frozen=True)
class Needs:
    """What a merge takes, estimated from headers."""

    read_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float


def needs_of(prepared: Prepared, *, threads: int | None = None) -> Needs:
    """What carrying it out takes."""
    from jaxlab.merging.layout import CHUNK, default_threads, is_streamed, scope_of, whole_bytes
    from jaxlab.merging.matrix_work import matrix_seconds

    plan, inputs = prepared.plan, prepared.inputs
    read, seconds, largest = 0, 0.0, 0
    for tensor in plan.tensors:
        step = tensor.merging
        sources = (tensor.copy,) if step is None else step.everything
        taken = sum(inputs[s.model][s.name].nbytes for s in sources if s is not None)
        scope = "element" if step is None else scope_of(step)
        read += taken
        seconds += (taken + tensor.nbytes) / _BYTES_A_SECOND[scope]
        if step is not None and scope == "matrix":
            shape = step.merged_shape(tensor.shape)
            seconds += matrix_seconds(step.operator, dict(step.parameters), shape) / _CORES
        if step is not None and not is_streamed(step):
            largest = max(largest, whole_bytes(step, math.prod(tensor.shape)))
    threads = threads or default_threads()
    memory = _BASE_MEMORY + threads * CHUNK * 64 + largest
    whole = [one for one in inputs if any(t.file is None for t in one.found.tensors.values())]
    for one in whole:  # a model of ours is read at once; of others a tensor at a time
        sizes = [t.nbytes for t in one.found.tensors.values()]
        memory += sum(sizes) if one.model.form in ("orbax", "llama2c") else max(sizes, default=0)
    if getattr(prepared.recipe, "data", None) is not None:  # the models, and float32 gradients of one
        sizes = [sum(t.size for t in one.found.tensors.values()) for one in inputs]
        memory += sum(t.nbytes for one in inputs for t in one.found.tensors.values()) + 8 * max(sizes)
    return Needs(read, plan.nbytes, memory, seconds)


def check_room(out: Path, shards: "Sequence[Sequence[Planned]]", *, beside: int = 0) -> None:
    """Whether a folder of these files can be made, as far as that can be known before.

    Args:
      beside: bytes that are written beside it on the same disk.

    Raises:
      UserError: no room on the disk, a limit on the size of files, a place that cannot be written.
    """
    out = Path(os.path.abspath(out))
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    parent = out.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{out}: cannot be made: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made: {parent} is not writable")
    longest = os.pathconf(parent, "PC_NAME_MAX") - len("..partial")
    for part in out.parts[len(parent.parts) :]:
        if len(os.fsencode(part)) > longest:
            raise UserError(f"{out}: a name of more than {longest} bytes; choose a shorter one")
    partial = out.parent / f".{out.name}.partial"
    there = sum(f.stat().st_blocks * 512 for f in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = shutil.disk_usage(parent).free + there
    needed = sum(sizes) + beside
    if needed > free:
        raise UserError(f"{out}: needs {_size(needed)}, the disk has {_size(free)} left")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and max(sizes, default=0) > limit:
        raise UserError(
            f"{out}: a file of {_size(max(sizes))} is beyond the limit on the size of files, {_size(limit)} "
            "(ulimit -f)"
        )


def describe(needs: Needs, out: Path | None = None) -> str:
    """What is needed, for people to read."""
    line = (
        f"reads {_size(needs.read_bytes)}, writes {_size(needs.written_bytes)}, holds about "
        f"{_size(needs.memory_bytes)} of memory, takes about {_time(needs.seconds)} on two cores"
    )
    if out is None:
        return line
    parent = Path(os.path.abspath(out)).parent
    while not parent.is_dir():
        parent = parent.parent
    return f"{line}; {_size(shutil.disk_usage(parent).free)} of disk are free"


def _size(count: int) -> str:
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit in ("bytes", "kB") else f"{value:.1f} {unit}"


def _time(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{round(seconds / 60)} min"
