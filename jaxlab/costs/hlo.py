"""What a compiled program exchanges between devices, read from its text."""

import dataclasses
import math
import re
from collections import Counter

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_CALL = re.compile(rf" = (.*?) ({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind and shape."""

    kind: str
    """One of `KINDS`."""
    shape: str
    """Type and dimensions of the results on one device."""
    group: int
    """Devices that exchange with each other; 0: not told."""
    times: int
    """How often one execution runs it: those of a loop's body as often as the loop's known trip count."""
    bytes: int
    """Of the results on one device, all times together."""


def collectives(hlo: str) -> list[Collective]:
    """The exchanges of one execution of an optimised program (`compiled.as_text()`), the largest first.

    A loop whose trip count is not known, and each branch of a conditional, counts once.
    """
    bodies, entry = _computations(hlo)
    found: Counter[tuple[str, str, int]] = Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if (call := _CALL.search(line)) is not None:
                found[call[2], _results(call[1], started=bool(call[3]), kind=call[2]), _group(line)] += times
            if (loop := re.search(r" while\(.*body=%?([\w.\-]+)", line)) is not None:
                trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
                visit(loop[1], times * (int(trips[1]) if trips else 1))
            elif " fusion(" not in line and _CALL.search(line) is None:
                called = re.findall(
                    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line
                )
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                called += re.findall(r"[\w.\-]+", branches[1]) if branches else []
                for other in called:
                    visit(other, times)

    visit(entry, 1)
    rows = [
        Collective(kind, shape, group, times, times * _bytes(shape))
        for (kind, shape, group), times in found.items()
    ]
    return sorted(rows, key=lambda row: (-row.bytes, row.kind, row.shape))


def by_kind(rows: list[Collective]) -> dict[str, dict[str, int]]:
    """How often each kind runs, and its bytes on one device."""
    return {
        kind: {
            "times": sum(row.times for row in rows if row.kind == kind),
            "bytes": sum(row.bytes for row in rows if row.kind == kind),
        }
        for kind in KINDS
        if any(row.kind == kind for row in rows)
    }


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        head = None if line.startswith(" ") else _HEAD.match(line)
        if head is not None:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _results(types: str, *, started: bool, kind: str) -> str:
    """The shapes that an exchange gives; one that is started has its operands before them."""
    shapes = [f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(types)]
    if started and kind != "all-reduce":
        if kind == "collective-permute":
            shapes = [shape for shape in shapes if not shape.startswith("u32[]")]
        shapes = shapes[len(shapes) // 2 :]
    return " ".join(shapes)


def _group(line: str) -> int:
    if (iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line)) is not None:
        return int(iota[1])
    if (listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line)) is not None:
        return len(listed[1].split(","))
    return 0


def _bytes(shape: str) -> int:
    bits = lambda dtype: 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * max(1, bits(dtype) // 8)
        for dtype, dims in _SHAPE.findall(shape)
    )
