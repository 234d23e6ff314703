"""What XLA moves and launches outside of the kernels, read from the optimised HLO of a compiled program.

Bytes are what each launch reads and writes of device memory at the least: every operand once, of an operand
that is only sliced the slices, of one that is updated in place the update. Loops count as often as they run.
A sort is one launch here, whatever its passes; so is a call of a library.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

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
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")


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


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        return shape_bytes(self.shape)


def shape_bytes(shape: str) -> int:
    """Of an array, or of all in a tuple."""
    total = 0
    for kind, dims in _SHAPE.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits.group()) if digits else 0
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def _operands(text: str) -> tuple[str, ...]:
    """Names up to the parenthesis that closes the call."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return tuple(re.findall(r"%([\w.\-]+)", text[:at]))
    return ()


def _computations(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    found: dict[str, dict[str, _Instruction]] = {}
    entry, here = "", ""
    for line in hlo.splitlines():
        head = _HEAD.match(line)
        if head and line.rstrip().endswith("{"):
            here = head.group(2)
            found[here] = {}
            entry = here if head.group(1) else entry
        elif (match := _LINE.match(line)) and here:
            name, shape, opcode, rest = match.groups()
            found[here][name] = _Instruction(name, shape, opcode, _operands(rest), rest)
    if not entry:
        raise ValueError("no ENTRY computation: this is no optimised HLO")
    return found, entry


def outside(hlo: str, largest: int = 8) -> Outside:
    """
    Raises:
        ValueError: the text is no optimised HLO, or a loop does not say how often it runs.
    """
    computations, entry = _computations(hlo)
    launches: list[Launch] = []
    kernels = 0

    def visit(name: str, times: int) -> None:
        nonlocal kernels
        body = computations[name]
        for x in body.values():
            if x.opcode in _FREE:
                continue
            if x.opcode == "while":
                trips = re.search(r"known_trip_count[^0-9]*(\d+)", x.rest)
                inside = re.search(r"body=%?([\w.\-]+)", x.rest)
                if trips is None or inside is None:
                    raise ValueError(f"loop {x.name} does not say how often it runs")
                visit(inside.group(1), times * int(trips.group(1)))
            elif x.opcode in ("call", "conditional", "async-start"):
                for called in re.findall(r"(?:to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", x.rest):
                    visit(called, times)
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
    x: _Instruction,
    body: dict[str, _Instruction],
    computations: dict[str, dict[str, _Instruction]],
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


def _bytes_of_fusion(fused: Sequence[_Instruction], sizes: list[int], written: int) -> int:
    """Through bitcasts, a parameter that is only sliced, or only updated in place, is not read whole."""
    users: dict[str, list[_Instruction]] = {}
    for x in fused:
        for name in x.operands:
            users.setdefault(name, []).append(x)
    by_name = {x.name: x for x in fused}

    def through(name: str) -> list[tuple[str, _Instruction]]:
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
