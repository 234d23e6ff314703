"""The optimised HLO of a compiled program, read as text: its computations, and how often each runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")


class Instruction(NamedTuple):
    """One line of a computation."""

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


def computations(hlo: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The instructions of every computation by name, and the name of the one that runs.

    Raises:
        ValueError: the text is no optimised HLO.
    """
    found: dict[str, dict[str, Instruction]] = {}
    entry, here = "", ""
    for line in hlo.splitlines():
        head = _HEAD.match(line)
        if head and line.rstrip().endswith("{"):
            here = head.group(2)
            found[here] = {}
            entry = here if head.group(1) else entry
        elif (match := _LINE.match(line)) and here:
            name, shape, opcode, rest = match.groups()
            found[here][name] = Instruction(name, shape, opcode, _operands(rest), rest)
    if not entry:
        raise ValueError("no ENTRY computation: this is no optimised HLO")
    return found, entry


def inner(x: Instruction) -> tuple[int | None, list[str]]:
    """The computations that an instruction runs, and how often each; None: the text does not say."""
    if x.opcode == "while":
        trips = re.search(r"known_trip_count[^0-9]*(\d+)", x.rest)
        body = re.search(r"body=%?([\w.\-]+)", x.rest)
        return int(trips.group(1)) if trips else None, [body.group(1)] if body else []
    if x.opcode in ("call", "conditional", "async-start"):
        called = re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", x.rest)
        called += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", x.rest)
        branches = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
        return 1, called + (re.findall(r"%?([\w.\-]+)", branches.group(1)) if branches else [])
    return 1, []


Met = tuple[Instruction, int | None, dict[str, Instruction]]
"""An instruction, how often it runs (None: the text does not say), and the computation that it stands in."""


def runs(hlo: str) -> Iterator[Met]:
    """Every instruction that one run of the program meets; of branches all count.

    Raises:
        ValueError: the text is no optimised HLO.
    """
    found, entry = computations(hlo)

    def visit(
        name: str, times: int | None
    ) -> Iterator[tuple[Instruction, int | None, dict[str, Instruction]]]:
        for x in found[name].values():
            yield x, times, found[name]
            each, bodies = inner(x)
            for body in bodies:
                yield from visit(body, None if times is None or each is None else times * each)

    yield from visit(entry, 1)
