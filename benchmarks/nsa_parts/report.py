"""From rows of measurements: where the curves cross, a table, a plot."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

Row = dict[str, Any]
PLOTTED = ("nsa ", "dense")
COLUMNS = ("forward", "backward", "both", "decode")


def label(row: Row) -> str:
    overlap = "" if row.get("overlap") is None else f", overlap {row['overlap']:g}"
    return row["name"] + overlap


def crossing(lengths: list[int], ratios: list[float]) -> float | None:
    """Length from which on the ratio NSA / dense stays below one, interpolated in the logarithms of both.

    0 if it is below at every length, None if it is not at the last.
    """
    points = sorted(zip(lengths, ratios, strict=True))
    if not points or points[-1][1] >= 1:
        return None
    above = [i for i, (_, ratio) in enumerate(points) if ratio >= 1]
    if not above:
        return 0.0
    (before, high), (after, low) = points[above[-1]], points[above[-1] + 1]
    share = math.log(high) / (math.log(high) - math.log(low))
    return before * (after / before) ** share


def crossovers(rows: list[Row]) -> list[Row]:
    """For each spec, part and overlap of NSA: against the fastest dense peer at each length."""
    timed = [row for row in rows if "median_s" in row]
    found = []
    for spec in dict.fromkeys(row["spec"] for row in timed):
        for part in ("forward", "both"):
            here = [row for row in timed if row["spec"] == spec and row["part"] == part]
            dense: dict[int, float] = {}
            for row in here:
                if row["name"].startswith("dense"):
                    dense[row["length"]] = min(row["median_s"], dense.get(row["length"], math.inf))
            for name in dict.fromkeys(label(row) for row in here if row["name"].startswith("nsa ")):
                own = {row["length"]: row["median_s"] for row in here if label(row) == name}
                lengths = sorted(own.keys() & dense.keys())
                ratios = [own[length] / dense[length] for length in lengths]
                tokens = crossing(lengths, ratios)
                speedups = {length: 1 / ratio for length, ratio in zip(lengths, ratios, strict=True)}
                found.append(
                    {"spec": spec, "part": part, "name": name, "tokens": tokens, "speedups": speedups}
                )
    return found


def table(rows: list[Row]) -> str:
    """Milliseconds: a line for each spec, length and name, a column for each part (decode: of one step)."""
    titles = " ".join(f"{part:>10s}" for part in COLUMNS)
    lines = [f"{'milliseconds':18s} {'tokens':>7s} {'name':44s} {titles}"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["spec"], row["length"], label(row)), []).append(row)
    for (spec, length, name), parts in groups.items():
        ms = {row["part"]: f"{1e3 * row['median_s']:10.3f}" for row in parts if "median_s" in row}
        numbers = " ".join(ms.get(part, f"{'-':>10s}") for part in COLUMNS)
        reasons = "; ".join(dict.fromkeys(row["reason"] for row in parts if "reason" in row))
        lines.append(f"{spec:18s} {length:7d} {name:44s} {numbers}  {reasons}".rstrip())
    return "\n".join(lines)


def describe(crossover: Row) -> str:
    tokens = crossover["tokens"]
    where = "not reached" if tokens is None else f"{tokens:.0f} tokens" if tokens else "below the shortest"
    last = list(crossover["speedups"].items())[-1:]
    factor = "".join(f", {speedup:.2f}x at {length}" for length, speedup in last)
    return f"{crossover['spec']}, {crossover['part']}, {crossover['name']}: crossover {where}{factor}"


def plot(rows: list[Row], path: Path) -> None:
    """Milliseconds by length: a row of axes for each spec, a column for each part."""
    timed = [row for row in rows if "median_s" in row and row["name"].startswith(PLOTTED)]
    specs = list(dict.fromkeys(row["spec"] for row in timed))
    if not specs:
        return
    parts = ("forward", "backward", "both")
    shape = {"figsize": (13, 3.8 * len(specs)), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(specs), len(parts), sharex=True, sharey="row", **shape)
    names = list(dict.fromkeys(label(row) for row in timed))
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for spec, line in zip(specs, axes, strict=True):
        for part, axis in zip(parts, line, strict=True):
            for name in names:
                own = [r for r in timed if (r["spec"], r["part"], label(r)) == (spec, part, name)]
                points = sorted((row["length"], 1e3 * row["median_s"]) for row in own)
                if points:
                    style = "--" if name.startswith("dense") else "-"
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, style, marker="o", markersize=3, color=colors[name], label=name)
            axis.set_xscale("log", base=2)
            axis.set(yscale="log", title=f"{spec}: {part}")
            axis.grid(alpha=0.3)
        line[0].set_ylabel("milliseconds")
        line[0].legend(fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    figure.savefig(path, dpi=110)
    plt.close(figure)
