"""What XLA moves and launches outside of the kernels, read from the optimised HLO of a compiled program.

Bytes are what each launch reads and writes of device memory at the least: every operand once, of an operand
that is only sliced the slices, of one that is updated in place the update. Loops count as often as they run.
A sort is one launch here, whatever its passes; so is a call of a library.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from kernels_pallas.hlo import Instruction, inner
from kernels_pallas.hlo import computations as hlo_computations

KERNELS = ("mosaic_gpu", "mosaic_gpu_v2")
"""Targets of the custom calls that are kernels of this package's kind."""
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "copy-done",
    "opt-barrier",
}
_SLICES = ("dynamic-slice", "slice", "gather")


class Launch(NamedTuple):
    """One place in the program."""

    name: str
    opcode: str
    times: int
    bytes_each: int

    @property
    def bytes(self) -> int:
        return self.times * self.bytes_each


class Outside(NamedTuple):
    """Of one run of the program."""

    bytes: int
    launches: int
    kernels: int
    """Launches of kernels, which the others do not count."""
    largest: tuple[Launch, ...]
    """By bytes, falling."""


def outside(hlo: str, largest: int = 8) -> Outside:
    """
    Raises:
        ValueError: the text is no optimised HLO, or a loop does not say how often it runs.
    """
    computations, entry = hlo_computations(hlo)
    launches: list[Launch] = []
    kernels = 0

    def visit(name: str, times: int) -> None:
        nonlocal kernels
        body = computations[name]
        for x in body.values():
            if x.opcode in _FREE:
                continue
            if x.opcode in ("while", "call", "conditional", "async-start"):
                trips, bodies = inner(x)
                if trips is None or not bodies:
                    raise ValueError(f"loop {x.name} does not say how often it runs")
                for body_name in bodies:
                    visit(body_name, times * trips)
            elif x.opcode == "custom-call" and any(f'target="{kernel}"' in x.rest for kernel in KERNELS):
                kernels += times
            else:
                launches.append(Launch(x.name, x.opcode, times, _bytes_of(x, body, computations)))

    visit(entry, 1)
    ordered = sorted(launches, key=lambda launch: -launch.bytes)
    return Outside(
        sum(launch.bytes for launch in launches),
        sum(launch.times for launch in launches),
        kernels,
        tuple(ordered[:largest]),
    )


def _bytes_of(
    x: Instruction,
    body: dict[str, Instruction],
    computations: dict[str, dict[str, Instruction]],
) -> int:
    sizes = [body[name].bytes for name in x.operands]
    if x.opcode == "fusion":
        match = re.search(r"calls=%?([\w.\-]+)", x.rest)
        assert match is not None, x
        return _bytes_of_fusion(list(computations[match.group(1)].values()), sizes, x.bytes)
    if x.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    if x.opcode in _SLICES:
        return 2 * x.bytes + sum(sizes[1:])
    return sum(sizes) + x.bytes


def _bytes_of_fusion(fused: Sequence[Instruction], sizes: list[int], written: int) -> int:
    """Through bitcasts, a parameter that is only sliced, or only updated in place, is not read whole."""
    users: dict[str, list[Instruction]] = {}
    for x in fused:
        for name in x.operands:
            users.setdefault(name, []).append(x)
    by_name = {x.name: x for x in fused}

    def through(name: str) -> list[tuple[str, Instruction]]:
        found = []
        for user in users.get(name, ()):
            found += through(user.name) if user.opcode == "bitcast" else [(name, user)]
        return found

    read = 0
    for x in fused:
        if x.opcode != "parameter":
            continue
        number = int(re.match(r"(\d+)", x.rest).group(1))  # type: ignore[union-attr]
        part = 0
        for name, user in through(x.name):
            if user.opcode in _SLICES and user.operands[0] == name:
                part += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                update = by_name[user.operands[1]].bytes
                written -= user.bytes - update
            else:
                part = sizes[number]
                break
        read += min(part, sizes[number])
    return read + max(written, 0)
