"""How a plan is carried out, told from the plan alone: in which files, in chunks or whole."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlab.checkpoints import Planned, Tensor, in_shards
from jaxlab.merging.operators import Operator, operator_named
from jaxlab.merging.operators.registry import Scope
from jaxlab.merging.plan import Input, MergePlan, Merging, dtype_of

CHUNK = 1 << 20
"""Elements that are merged at once."""


def default_threads() -> int:
    """One more than there are cores, up to five: one of them waits for a file while the others compute."""
    return min(5, 1 + (os.cpu_count() or 1))


def operator_of(name: str, injected: bool) -> Operator:
    operator = operator_named(name)
    return operator.for_injection if injected else operator


def scope_of(step: Merging) -> Scope:
    """What an element of the output depends on; see `Operator.scope`."""
    return operator_of(step.operator, step.injected).scope(step.mode, dict(step.parameters))


def whole_bytes(step: Merging, size: int) -> int:
    """About what merging a tensor of `size` elements whole takes."""
    return size * 4 * (2 * len(step.everything) + 3)


def is_streamed(step: Merging) -> bool:
    """Whether it is merged in chunks, be they of whole rows."""
    scope = scope_of(step)
    gather = operator_of(step.operator, step.injected).gather
    return scope in ("element", "cut", "row") or (
        scope == "model" and gather is not None and bool(gather.thresholds)
    )


def layout(
    plan: MergePlan, inputs: Sequence[Mapping[str, Tensor] | Input], shard_bytes: int | None = None
) -> list[list[Planned]]:
    """The tensors of each file of the output: those of the first input's files, or cut by size.

    Args:
      shard_bytes: cut by this size, whatever the first input has.
    """
    planned = [Planned(t.name, dtype_of(t.dtype), t.shape, _never) for t in plan.tensors]
    files: dict[str, list[Planned]] = {}
    for tensor in planned:
        try:
            file = inputs[0][tensor.name].file
        except KeyError:  # a plan may have names of its own
            file = None
        files.setdefault("" if file is None else str(file), []).append(tensor)
    if shard_bytes is not None or "" in files:
        return in_shards(planned) if shard_bytes is None else in_shards(planned, shard_bytes)
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in files.values()]


def _never() -> np.ndarray:
    raise AssertionError("an engine writes it")
