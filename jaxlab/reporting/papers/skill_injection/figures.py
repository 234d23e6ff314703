"""Figures of a scenario: scores over the weights, the front of gained and kept skill, lambdas by layer, and
the task vectors themselves."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder, at
from jaxlab.reporting.formats import Number, decimal, percent
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import figure, folded, table
from jaxlab.reporting.papers.skill_injection.scenario import Scenario, operator_name

_MOST_PANELS = 8
_MODULES = ("attention", "mlp")


def curves_over_lambda(s: Scenario) -> Markup | None:
    """The target's score over lambda_e, all else as chosen; a band over seeds."""
    series: dict[str, Any] = {}
    for name in list(s.operators)[: len(plots.SERIES)]:
        seeds = [curve for run in s.runs if (curve := _over_lambda_e(s, run, name))]
        if seeds and any(len(x) > 1 for x, _ in seeds):
            series[operator_name(name)] = seeds
    if not series:
        return None
    with plots.style():
        drawing, grid = plots.canvas(8.8, 3.1)
        axes = grid[0, 0]
        plots.curves(axes, series, markers=True)
        axes.set(xlabel="λₑ (expert)", ylabel="score, validation")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    band = ""
    if len(s.runs) > 1:
        band = f" Lines are means of {len(s.runs)} seeds, bands reach from the lowest to the highest."
    return figure(
        drawing,
        f"curves-{s.run.name}",
        f"How far the expert's weight carries: {s.name}.",
        "Each entry along λₑ with its other settings as chosen: a skill that transfers rises and falls, and "
        f"how wide the top is says how much the weight matters.{band}",
    )


def _over_lambda_e(s: Scenario, run: RunFolder, name: str) -> tuple[list[Number], list[Number]] | None:
    operator = run.get("operators", name) or {}
    if operator.get("method", "grid") != "grid" or not operator.get("best"):
        return None
    rest = lambda point: {k: v for k, v in settings_of(point).items() if k != "lambda_e"}
    wanted = rest(operator["best"])
    found = sorted(
        (p["lambda_e"], score)
        for p in operator.get("points", [])
        if rest(p) == wanted and (score := at(p, "validation", str(s.target))) is not None
    )
    return ([x for x, _ in found], [y for _, y in found]) if found else None


def settings_of(point: dict[str, Any]) -> dict[str, Any]:
    """The values of a point, without what was measured there."""
    measured = ("validation", "test", "score", "kept", "entropy", "details", "layers_v", "layers_e")
    return {name: value for name, value in point.items() if name not in (*measured, "index", "loss", "steps")}


def density_maps(s: Scenario) -> Markup | None:
    """The target's score over density and lambda_e, lambda_v as chosen."""
    panels = []
    for name, operator in s.operators.items():
        best = operator.get("best") or {}
        rest = lambda p: {k: v for k, v in settings_of(p).items() if k not in ("lambda_e", "density")}
        points = [p for p in operator.get("points", []) if best and rest(p) == rest(best)]
        if operator.get("method", "grid") != "grid" or len({p.get("density") for p in points}) < 2:
            continue
        panels.append(panel(s, operator_name(name), points, best, "density", "lambda_e"))
    if not panels:
        return None
    drawing = plots.heat_maps(panels[:_MOST_PANELS], min(3, len(panels)), "density", "λₑ (expert)")
    return figure(
        drawing,
        f"density-{s.run.name}",
        f"Density against weight: {s.name}.",
        "Score in per cent on the validation split, λᵥ as chosen: whether keeping more of the task vectors "
        "or weighing them more does the same.",
    )


def panel(
    s: Scenario, title: str, points: Sequence[dict[str, Any]], best: dict[str, Any], row: str, column: str
) -> dict[str, Any]:
    """A heat map's panel of the target's score over two settings."""
    rows, columns = (sorted({p[key] for p in points}) for key in (row, column))
    values: list[list[Any]] = [[None] * len(columns) for _ in rows]
    for p in points:
        values[rows.index(p[row])][columns.index(p[column])] = at(p, "validation", str(s.target))
    return {
        "title": title,
        "rows": rows,
        "columns": columns,
        "values": values,
        "chosen": (rows.index(best[row]), columns.index(best[column])),
    }


def fronts(s: Scenario) -> Markup | None:
    """Every point by the skill that it keeps and the skill that it gains, and the front of both."""
    points = {
        name: [(p["kept"], p["score"]) for p in operator.get("points", []) if "kept" in p]
        for name, operator in s.operators.items()
    }
    points = {name: found for name, found in points.items() if found}
    if not points:
        return None
    everything = sorted({pair for found in points.values() for pair in found})
    front = [
        (x, y)
        for x, y in everything
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in everything)
    ]
    with plots.style():
        drawing, grid = plots.canvas(8.8, 3.6)
        axes = grid[0, 0]
        for i, (name, found) in enumerate(points.items()):
            axes.scatter(
                *zip(*found, strict=True),
                s=22,
                color=plots.SERIES[i % len(plots.SERIES)],
                marker="os^Dv<>P"[(i + i // len(plots.SERIES)) % 8],
                alpha=0.75,
                linewidths=0,
                label=operator_name(name),
            )
        axes.plot(*zip(*front, strict=True), color=plots.INK, linewidth=1.3, zorder=1)
        alone = s.run.get("unmerged", "vlm", "validation") or {}
        own, target = s.own(alone), at(alone, str(s.target))
        if own is not None and target is not None:
            axes.scatter([own], [target], marker="x", s=50, color=plots.INK, label="VLM alone")
        axes.set(xlabel="kept: the VLM's own skill", ylabel="gained: the expert's skill")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure(
        drawing,
        f"front-{s.run.name}",
        f"What a gain costs: {s.name}.",
        "Every point that was tried, validation split: up is more of the expert's skill, right is more of "
        "the VLM's own. The line is the front: no point beats one of it in both.",
    )


def lambdas_by_layer(s: Scenario) -> Markup | None:
    """Weights that differ by layer, of the chosen points."""
    lines: dict[str, list[Number]] = {}
    for name, operator in s.operators.items():
        best = operator.get("best") or {}
        for key, letter in (("layers_v", "λᵥ"), ("layers_e", "λₑ")):
            if best.get(key):
                lines[f"{operator_name(name)}, {letter}"] = best[key]
    if not lines or max(map(len, lines.values())) < 2:
        return None
    with plots.style():
        drawing, grid = plots.canvas(8.8, 3.1)
        axes = grid[0, 0]
        numbered = {name: [(list(range(1, len(v) + 1)), v)] for name, v in lines.items()}
        plots.curves(axes, numbered, markers=True)
        axes.set(xlabel="layer", ylabel="weight")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure(
        drawing,
        f"layers-{s.run.name}",
        f"Weights by layer: {s.name}.",
        "Of entries in which layers have weights of their own: found, learned, or shaped by the expert's "
        "information flow. A flat line is a weight for all.",
    )


def task_vectors(s: Scenario) -> Markup | None:
    """Sizes and cosines of the task vectors by layer."""
    rows = s.run.get("task_vectors") or []
    inside = [row for row in rows if row["layer"] is not None and row["module"] in _MODULES]
    if len({row["layer"] for row in inside}) < 2:
        return None
    of = lambda module: [row for row in inside if row["module"] == module]
    layers = lambda module: [row["layer"] + 1 for row in of(module)]
    sizes: dict[str, Any] = {}
    cosines: dict[str, Any] = {}
    for module in _MODULES:
        for key, who in (("norm_v", "VLM"), ("norm_e", "expert")):
            relative = [row[key] / row["norm_base"] if row["norm_base"] else 0.0 for row in of(module)]
            sizes[f"{who}, {module}"] = [(layers(module), relative)]
        cosines[module] = [(layers(module), [row["cosine"] or 0.0 for row in of(module)])]
    drawing = _two_panels(sizes, cosines)
    outside = [
        [
            "" if row["layer"] is None else str(row["layer"] + 1),
            row["module"].replace("_", " "),
            percent(row["norm_v"] / row["norm_base"] if row["norm_base"] else None, 1),
            percent(row["norm_e"] / row["norm_base"] if row["norm_base"] else None, 1),
            decimal(row["cosine"], 3),
        ]
        for row in rows
    ]
    head = ["layer", "module", "VLM", "expert", "cosine"]
    return Markup(
        figure(
            drawing,
            f"vectors-{s.run.name}",
            f"What is merged: {s.name}.",
            "Left, how far VLM and expert moved from the base, as a share of its norm. Right, the cosine of "
            "the two moves: near zero they touch different directions, below it they pull apart.",
        )
        + folded(
            "Every module",
            table(head, outside, "Norms over the base's norm, and cosines.", "Layers count from 1.", texts=2),
        )
    )


def _two_panels(left: plots.Curves, right: plots.Curves) -> Figure:
    with plots.style():
        drawing, grid = plots.canvas(8.8, 3.1, columns=2)
        for axes, series, label in ((grid[0, 0], left, "size"), (grid[0, 1], right, "cosine")):
            plots.curves(axes, series, markers=True)
            axes.set(xlabel="layer", title=label)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.legend(loc="best")
        grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
        grid[0, 1].axhline(0, color=plots.FAINT, linewidth=0.8)
    return drawing


def ways(s: Scenario) -> Markup | None:
    """What each way of choosing took, by entry."""
    found = {name: o.get("chosen") or {} for name, o in s.operators.items()}
    if max(map(len, found.values()), default=0) < 2:
        return None
    rows = []
    for name, chosen in found.items():
        for i, (way, point) in enumerate(chosen.items()):
            rows.append(
                [
                    operator_name(name) if i == 0 else "",
                    way,
                    decimal(point.get("lambda_v"), 2),
                    decimal(point.get("lambda_e"), 2),
                    percent(at(point, "validation", str(s.target)), 1),
                    percent(at(point, "test", str(s.target)), 1),
                ]
            )
    return table(
        ["entry", "chosen by", "λᵥ", "λₑ", "validation", "test"],
        rows,
        f"Chosen with and without labels: {s.name}.",
        "labels: the highest score. entropy: the model surest of its own answers. neighbours: the answers "
        "that change least to neighbouring points. What no labels cost is the difference in the last column.",
        texts=2,
    )
