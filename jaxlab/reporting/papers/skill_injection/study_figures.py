"""Figures of an injection study."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlab.reporting.papers.skill_injection.study import SCENARIOS, Json, Study, mean, validation
from jaxlab.reporting.plots import BLUE, FAINT, GREEN, HEAT, INK, ORANGE, canvas

FAMILY = {"task_arithmetic": BLUE, "dare": ORANGE}


def draw_operators(study: Study) -> Any:
    labels = study.ranked()[::-1]
    figure, grid = canvas(9.6, 0.9 + 0.22 * len(labels), columns=3, sharey=True)
    for axes, (scenario, (_, title, _)) in zip(grid[0], SCENARIOS.items(), strict=True):
        for i, label in enumerate(labels):
            values = study.values(label, "target", scenario)
            colour = _family(label)
            axes.plot([100 * min(values), 100 * max(values)], [i, i], color=colour, linewidth=1.2)
            axes.plot([100 * v for v in values], [i] * len(values), "o", color=colour, markersize=4)
        axes.axvline(100 * mean(study.donors(scenario)), color=GREEN, linewidth=1, linestyle=(0, (3, 2)))
        axes.set(title=title, xlabel="right answers, %", xlim=(-2, 102))
        axes.set_yticks(range(len(labels)), labels)
    return figure


def grid_of(record: Json) -> tuple[list[float], list[float], np.ndarray, np.ndarray]:
    """Weights of VLM and expert, and accuracies [v, e] of target and kept."""
    v, e = record["keys"].index("lambda_v"), record["keys"].index("lambda_e")
    rows, columns = (sorted({p[i] for p in record["points"]}) for i in (v, e))
    target, kept = np.full((2, len(rows), len(columns)), np.nan)
    for p in record["points"]:
        target[rows.index(p[v]), columns.index(p[e])], kept[rows.index(p[v]), columns.index(p[e])] = p[-2:]
    return rows, columns, target, kept


def over_seeds(study: Study, scenario: str) -> tuple[list[float], list[float], np.ndarray, np.ndarray]:
    found = [grid_of(study.records["task_arithmetic"][scenario, seed]) for seed in study.seeds]
    return found[0][0], found[0][1], np.stack([f[2] for f in found]), np.stack([f[3] for f in found])


def draw_weights(study: Study) -> Any:
    figure, grid = canvas(9.6, 2.4, columns=3)
    for axes, (scenario, (_, title, _)) in zip(grid[0], SCENARIOS.items(), strict=True):
        rows, columns, target, _ = over_seeds(study, scenario)
        values = target.mean(0)
        axes.pcolormesh(values, cmap=HEAT, vmin=0, vmax=1, edgecolors="#fdfcfa", linewidth=1)
        for (i, j), value in np.ndenumerate(values):
            colour = "#ffffff" if value > 0.45 else "#10202c"
            axes.text(
                j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8
            )
        axes.set_xticks(np.arange(len(columns)) + 0.5, [f"{x:g}" for x in columns])
        axes.set_yticks(np.arange(len(rows)) + 0.5, [f"{x:g}" for x in rows])
        axes.set(title=title, xlabel="weight of the expert")
        axes.grid(False)
    grid[0][0].set_ylabel("weight of the VLM")
    return figure


def draw_curves(study: Study) -> Any:
    figure, grid = canvas(9.6, 2.8, columns=3, sharey=True)
    for axes, (scenario, (_, title, _)) in zip(grid[0], SCENARIOS.items(), strict=True):
        rows, columns, target, kept = over_seeds(study, scenario)
        at = int(target.mean(0).max(1).argmax())
        for values, colour, name in ((target, BLUE, "injected skill"), (kept, ORANGE, "VLM's own skill")):
            line = 100 * values[:, at]
            axes.fill_between(columns, line.min(0), line.max(0), color=colour, alpha=0.18, linewidth=0)
            axes.plot(columns, line.mean(0), color=colour, marker="o", label=name)
        axes.set(title=f"{title}, VLM at {rows[at]:g}", xlabel="weight of the expert", ylim=(-2, 102))
    grid[0][0].set_ylabel("right answers, %")
    grid[0][0].legend(loc="lower right")
    return figure


def draw_rescaling(study: Study) -> Any:
    figure, grid = canvas(9.6, 2.8, columns=3, sharey=True)
    kinds = [("dare_linear", BLUE, "rescaled"), ("dare_linear_unscaled", ORANGE, "not rescaled")]
    for axes, (scenario, (_, title, _)) in zip(grid[0], SCENARIOS.items(), strict=True):
        for label, colour, name in kinds:
            if label not in study.records:
                continue
            series: dict[float, list[float]] = {}
            for seed in study.seeds:
                record = study.records[label][scenario, seed]
                at = record["keys"].index("density")
                for density in sorted({p[at] for p in record["points"]}):
                    best = max(p[-2] for p in record["points"] if p[at] == density)
                    series.setdefault(density, []).append(100 * best)
            x = list(series)
            axes.fill_between(x, [min(v) for v in series.values()], [max(v) for v in series.values()],
                              color=colour, alpha=0.18, linewidth=0)  # fmt: skip
            axes.plot(x, [mean(v) for v in series.values()], color=colour, marker="o", label=name)
        whole = 100 * mean([validation(study.records["task_arithmetic"][scenario, s]) for s in study.seeds])
        axes.axhline(whole, color=INK, linewidth=1, linestyle=(0, (3, 2)), label="task arithmetic")
        axes.set(title=title, xlabel="density", ylim=(-2, 102))
    grid[0][0].set_ylabel("right answers, %")
    grid[0][0].legend(loc="lower right")
    return figure


def draw_pareto(study: Study) -> Any:
    points = {
        label: (100 * mean(study.values(label, "kept")), 100 * mean(study.values(label, "target")))
        for label in study.records
    }
    front = [
        label for label, (kept, target) in points.items()
        if not any(k >= kept and t >= target and (k, t) != (kept, target) for k, t in points.values())
    ]  # fmt: skip
    best = max(target for _, target in points.values())
    near = {label: point for label, point in points.items() if point[1] >= best - 10}
    figure, grid = canvas(9.6, 4.6, 2)
    for axes, shown, titled in (
        (grid[0, 0], points, {k: v for k, v in points.items() if k not in near}),
        (grid[0, 1], near, near),
    ):
        for label, (kept, target) in shown.items():
            axes.plot(kept, target, "o", color=_family(label), markersize=7 if label in front else 4)
        steps = sorted(points[label] for label in front)
        axes.plot(*zip(*steps, strict=True), color=GREEN, linewidth=1, linestyle=(0, (3, 2)))
        axes.axvline(100 * mean(study.alone("kept")), color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xlabel("VLM's own skill kept, % (dotted: before)")
        axes.margins(0.12, 0.08)
        _name_points(axes, titled)
    grid[0, 0].set(ylabel="injected skill on images, %", title="all operators")
    grid[0, 1].set_title("those within 10 points of the best")
    return figure


def _family(label: str) -> str:
    return next((colour for name, colour in FAMILY.items() if label.startswith(name)), FAINT)


def _name_points(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside points, each in the nearest place where it covers neither a name nor a point; the higher
    a point, the earlier it chooses."""
    figure = axes.figure
    figure.draw_without_rendering()
    dots = [axes.transData.transform(point) for point in points.values()]
    taken: list[Any] = []
    for label, point in sorted(points.items(), key=lambda item: -item[1][1]):
        for (x, y), side in _PLACES:
            text = axes.annotate(
                label, point, (x, y), textcoords="offset points", fontsize=6.5, ha=side, va="center",
                color=_family(label) if _family(label) != FAINT else INK,
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": FAINT} if abs(y) > 6 else None,
            )  # fmt: skip
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in taken) and axes.bbox.contains(box.x1, box.y1)
            if free and axes.bbox.contains(box.x0, box.y0) and not any(box.contains(*dot) for dot in dots):
                taken.append(box)
                break
            text.remove()


_PLACES = tuple(
    ((side * (5 + reach), y), "left" if side > 0 else "right")
    for reach, heights in (
        (0, (0, 5, -5)),
        (6, (10, -10)),
        (10, (16, -16, 23, -23)),
        (16, (31, -31, 40, -40)),
    )
    for y in heights
    for side in (1, -1)
)
"""Where a name may go, nearest first: points to the right and up, and the side of it that is fixed."""


FIGURES: Mapping[str, Callable[[Study], Any]] = {
    "operators": draw_operators,
    "weights": draw_weights,
    "curves": draw_curves,
    "rescaling": draw_rescaling,
    "pareto": draw_pareto,
}
