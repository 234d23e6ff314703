"""What the devices of a mesh exchange in one run of a compiled program, read from its optimised HLO."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from kernels_pallas.hlo import Instruction, runs

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """Exchanges of one kind and shape between the devices along some axes of the mesh."""

    kind: str
    shape: str
    """Type and sizes of what one device gets."""
    axes: tuple[str, ...]
    """Of the mesh, along which the devices differ that exchange something; () where the text names none."""
    bytes: int
    """Of one exchange, of what one device gives or gets, whichever is more."""
    times: int
    """In one run."""
    known: bool = True
    """False: in a loop that does not say how often it runs, and counted once."""


def read_collectives(hlo: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """What one run exchanges, the most bytes first. Of branches all count.

    Args:
      hlo: the optimised text, `compiled.as_text()`.
      mesh: that it was compiled for, with its axes in order.

    Raises:
      ValueError: the text is no optimised HLO.
    """
    found: Counter[Collective] = Counter()
    for x, times, body in runs(hlo):
        kind = x.opcode.removesuffix("-start")
        if kind in KINDS:
            given = sum(body[name].bytes for name in x.operands if name in body)
            got = x.bytes - (given if x.opcode.endswith("-start") and x.shape.startswith("(") else 0)
            shape = _result(x)
            one = Collective(kind, shape, _axes(x, mesh), max(given, got), 0, times is not None)
            found[one] += 1 if times is None else times
    listed = [one._replace(times=times) for one, times in found.items()]
    return sorted(listed, key=lambda c: (-c.bytes * c.times, c.kind, c.axes, c.shape))


def by_kind(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Sums over the sizes, for people and files: kind, axes, times and bytes of one run, the largest one."""
    sums: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for c in found:
        row = sums.setdefault(
            (c.kind, c.axes),
            {"kind": c.kind, "axes": "+".join(c.axes) or "?", "times": 0, "bytes": 0, "largest": 0},
        )
        row["times"] += c.times
        row["bytes"] += c.bytes * c.times
        row["largest"] = max(row["largest"], c.bytes)
        if not c.known:
            row["at_least"] = True
    return list(sums.values())


def _result(x: Instruction) -> str:
    """The shapes that an exchange gives; one that is started lists its operands before them."""
    shapes = re.findall(r"[a-z]\w*\[[\d,]*\]", x.shape)
    if x.opcode.endswith("-start") and x.shape.startswith("(") and x.opcode != "all-reduce-start":
        shapes = shapes[len(x.operands) :][: len(x.operands)]
    return " ".join(shapes)


def _axes(x: Instruction, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    sizes = tuple(mesh.shape.values())
    groups = _groups(x.rest, int(np.prod(sizes)))
    varied: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        varied |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(name for number, name in enumerate(mesh.shape) if number in varied)


def _groups(text: str, devices: int) -> list[list[int]]:
    """The groups of devices that exchange something with each other."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return [[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if listed:
        groups = [[int(n) for n in g.split(",") if n] for g in re.findall(r"\{([\d,]*)\}", listed.group(1))]
        return groups or [list(range(devices))]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if named:  # a mesh of its own, and the axes of it that a group goes along
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        along = [list(sizes).index(name) for name in re.findall(r"'([^']+)'(?!:)", named.group(2))]
        numbers = np.arange(np.prod([*sizes.values()])).reshape([*sizes.values()])
        last = np.moveaxis(numbers, along, range(-len(along), 0)) if along else numbers[..., None]
        members = int(np.prod([numbers.shape[axis] for axis in along])) if along else 1
        return [list(map(int, group)) for group in last.reshape(-1, members)]
    # [groups, members]<=[shape]T(permutation): the numbers in order, reshaped, transposed, reshaped.
    short = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if short is None:
        return []
    into, shape = ([int(n) for n in part.split(",")] for part in short.groups()[:2])
    numbers = np.arange(np.prod(shape)).reshape(shape)
    if short.group(3):
        numbers = numbers.transpose([int(n) for n in short.group(3).split(",")])
    return [list(map(int, group)) for group in numbers.reshape(into)]
