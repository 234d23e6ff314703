"""The page of the injection study, its plots and its verdicts, from what docs/injection_study.py found."""

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.files import write_atomic
from jaxlab.reporting.papers.skill_injection import rules
from jaxlab.reporting.plots import BLUE, FAINT, GREEN, HEAT, INK, ORANGE, canvas, style
from jaxlab.reporting.verdicts import Verdict

SCENARIOS = {
    "format": ("M1", "instruction following", "answer formats"),
    "french": ("M2", "cross-lingual", "French"),
    "arithmetic": ("M3", "mathematical reasoning", "sums and products"),
}
COMMAND = "python docs/injection_study.py --run"
FAMILY = {"task_arithmetic": BLUE, "dare": ORANGE}
Json = dict[str, Any]


def records_of(scenario: str, seed: int, results: Json, origin: str) -> tuple[Json, list[Json]]:
    """What a search of one scenario found, for a study: the models before it, and a record for each
    operator.

    Args:
      results: the search's results.json, of data sets named image_<scenario>, image_words and
        text_<scenario>.
      origin: what made it, in words.
    """
    names = {f"image_{scenario}": "target", "image_words": "kept", f"text_{scenario}": "donor"}
    told = lambda measures: {names[k]: round(v, 4) for k, v in measures.items() if k in names}
    here = {"scenario": scenario, "seed": seed}
    unmerged = {role: told(splits["test"]) for role, splits in results["unmerged"].items()}
    records = []
    for label, found in results["operators"].items():
        tried = found["points"]
        keys = [k for k, v in tried[0].items() if k != "score" and isinstance(v, bool | int | float)]
        measured = [told(row["validation"]) for row in tried]
        points = [
            [*(row[key] for key in keys), measures["target"], measures["kept"]]
            for row, measures in zip(tried, measured, strict=True)
        ]
        best = {key: found["best"][key] for key in keys}
        test = told(found["best"]["test"])
        record = {"label": label, "best": best, "test": test, "keys": keys, "points": points}
        records.append({**here, **record, "origin": origin})
    return {**here, **unmerged}, records


class Study:
    """The records of operators that were searched in every scenario with every seed."""

    def __init__(self, told: Json) -> None:
        self.unmerged = {(r["scenario"], r["seed"]): r for r in told["unmerged"]}
        begun = {seed for _, seed in self.unmerged}
        self.seeds = sorted(s for s in begun if all((name, s) in self.unmerged for name in SCENARIOS))
        found: dict[str, dict[tuple[str, int], Json]] = {}
        for record in told["records"]:
            found.setdefault(record["label"], {})[record["scenario"], record["seed"]] = record
        wanted = {(scenario, seed) for scenario in SCENARIOS for seed in self.seeds}
        whole = [label for label, cells in found.items() if set(cells) == wanted]
        self.missing = [label for label in told.get("searched", found) if label not in whole]
        self.records = {label: cells for label, cells in found.items() if set(cells) == wanted}
        self.cells = [(scenario, seed) for scenario in SCENARIOS for seed in self.seeds]
        self.origins = sorted({r["origin"] for r in told["records"]})

    def values(self, label: str, measure: str, scenario: str | None = None) -> list[float]:
        """On the test split, by cell."""
        return [self.records[label][c]["test"][measure] for c in self.cells if scenario in (None, c[0])]

    def alone(self, measure: str, scenario: str | None = None) -> list[float]:
        """The VLM's without injection."""
        return [self.unmerged[c]["vlm"][measure] for c in self.cells if scenario in (None, c[0])]

    def donors(self, scenario: str) -> list[float]:
        return [self.unmerged[c]["expert"]["donor"] for c in self.cells if c[0] == scenario]

    def ranked(self) -> list[str]:
        """Labels, the highest mean on images first."""
        return sorted(self.records, key=lambda label: -mean(self.values(label, "target")))

    def net(self, label: str) -> list[float]:
        """By cell: what was gained on images less what was lost of the VLM's own skill."""
        gained = differences(self.values(label, "target"), self.alone("target"))
        lost = differences(self.alone("kept"), self.values(label, "kept"))
        return differences(gained, lost)

    def at_an_edge(self, label: str) -> int:
        """In how many cells the chosen weights are the least or the greatest of their list: more may be
        beyond."""
        found = 0
        for cell in self.cells:
            record = self.records[label][cell]
            for name in ("lambda_v", "lambda_e"):
                tried = [point[record["keys"].index(name)] for point in record["points"]]
                if record["best"][name] in (min(tried), max(tried)):
                    found += 1
                    break
        return found

    def settings(self, label: str) -> list[float]:
        """The same of every setting that was tried (validation split; the VLM alone on the test split)."""
        found = []
        for cell in self.cells:
            record, vlm = self.records[label][cell], self.unmerged[cell]["vlm"]
            found += [row[-2] - vlm["target"] - (vlm["kept"] - row[-1]) for row in record["points"]]
        return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def band(values: Sequence[float], digits: int = 0) -> str:
    """The mean, and from the least to the greatest."""
    number = lambda v: f"{100 * v:.{digits}f}"
    low, high = number(min(values)), number(max(values))
    return f"{number(mean(values))} ({low} … {high})" if low != high else number(mean(values))


def write(told: Json, docs: Path) -> None:
    """Writes injection_study.md and the figures beside it."""
    study = Study(told)
    folder = docs / "injection_study"
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        with style():
            figure = draw(study)
            figure.set_facecolor("#fdfcfa")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    write_atomic(docs / "injection_study.md", page(study))


def wrapped(text: str) -> list[str]:
    """A paragraph of the page, and an empty line."""
    return [*textwrap.wrap(" ".join(text.split()), 110), ""]


def figure(name: str, caption: str) -> list[str]:
    return [f"![{caption}](injection_study/{name}.svg)", "", f"*{caption}*", ""]


def page(study: Study) -> str:
    labels = study.ranked()
    seeds = len(study.seeds)
    points = len(next(iter(study.records[labels[0]].values()))["points"])
    counts = (
        f"{len(labels)} operators, with {points} settings each (weights, densities and what else they have)"
    )
    lines = [
        "# Skill injection on digits: operators, scenarios, weights",
        "",
        "<!-- Written by `python docs/injection_study.py` from docs/results/injection_study.json. -->",
        "",
        *wrapped(
            f"""A small language model (4 layers, width 64) learns English questions about digits. A VLM that
            sees handwritten digits, and three experts on text (answer formats, French, sums and
            products), are fine-tuned from it. Each expert is injected into the VLM by {counts}, {seeds}
            times from the base on (seeds {", ".join(map(str, study.seeds))}). The setting that is best on
            160 validation questions is measured on 160 others. Numbers are exact match in per cent, means
            over seeds; in brackets the least and the greatest."""
        ),
        *wrapped(
            """It is a miniature: one kind of task, models of 0.2 million parameters. What the paper found on
            real models it can neither confirm nor refute; what the claims mean here is told below."""
        ),
        *figure(
            "operators",
            "Accuracy on images of the skill that only the expert was taught; a point for each seed.",
        ),
        "## Operators and scenarios",
        "",
        *scenario_table(study),
    ]
    lines += ["## The claims", "", *claims(study), ""]
    lines += [
        *figure(
            "weights",
            "Task arithmetic: accuracy in per cent by both weights, mean over seeds, validation split.",
        ),
        *figure(
            "curves",
            "Task arithmetic at the best weight of the VLM: band from the least to the greatest seed.",
        ),
        "## DARE with and without rescaling",
        "",
        *rescaling(study),
        *figure("rescaling", "DARE at each density: the best setting by seed, validation split."),
        "## What is gained and what is lost",
        "",
        *figure(
            "pareto",
            "The chosen setting of every operator, mean over seeds and scenarios; the front is marked. Names "
            "that found no room are in the tables.",
        ),
        "## Does only task arithmetic gain reliably?",
        "",
        *reliably(study, labels),
        "## How it was made",
        "",
        f"`{COMMAND} --seeds {' '.join(map(str, study.seeds))}`. {'; '.join(study.origins)}.",
    ]
    if study.missing:
        lines += [
            "",
            "In `configs/injection/`, but not run here in every scenario with every seed: "
            + ", ".join(f"`{label}`" for label in study.missing)
            + ".",
        ]
    return "\n".join(lines) + "\n"


def scenario_table(study: Study) -> list[str]:
    """Accuracy on images by operator and scenario, beside the VLM alone and the expert itself."""
    lines = [
        "| operator | instruction following | cross-lingual | mathematical | mean | VLM's own skill kept |",
        "|---|---|---|---|---|---|",
    ]
    alone = [band(study.alone("target", s)) for s in SCENARIOS]
    lines.append(
        f"| VLM alone | {' | '.join(alone)} | {band(study.alone('target'))} | {band(study.alone('kept'))} |"
    )
    for label in study.ranked():
        cells = [band(study.values(label, "target", s)) for s in SCENARIOS]
        whole = f"{100 * mean(study.values(label, 'target')):.1f}"
        lines.append(f"| `{label}` | {' | '.join(cells)} | {whole} | {band(study.values(label, 'kept'))} |")
    donors = [band(study.donors(s)) for s in SCENARIOS]
    return [*lines, f"| the expert itself, on text | {' | '.join(donors)} | | |", ""]


def verdicts(study: Study) -> dict[str, list[Verdict]]:
    """By claim one verdict for each seed, by the rules of the report."""
    found: dict[str, list[Verdict]] = {}
    for scenario, (name, _, what) in SCENARIOS.items():
        claim = next(c for c in rules.CLAIMS if c.id == name)
        for seed in study.seeds:
            cell = scenario, seed
            best = max(study.records, key=lambda label: validation(study.records[label][cell]))
            tested, alone = study.records[best][cell]["test"], study.unmerged[cell]
            transfer = rules.Transfer(
                what,
                alone["vlm"]["target"],
                tested["target"],
                alone["expert"]["donor"],
                alone["vlm"]["kept"],
                tested["kept"],
            )
            found.setdefault(name, []).append(rules.transfers(claim, transfer, expected=name != "M3"))
    for seed in study.seeds:
        scores = {
            label: mean([cells[s, seed]["test"]["target"] for s in SCENARIOS])
            for label, cells in study.records.items()
        }
        tried = {
            label: sum(len(cells[s, seed]["points"]) for s in SCENARIOS)
            for label, cells in study.records.items()
        }
        found.setdefault("M4", []).append(rules.m4(scores, tried))
        grids = {
            s: [row[-2] for cells in study.records.values() for row in cells[s, seed]["points"]]
            for s in SCENARIOS
        }
        found.setdefault("M5", []).append(rules.m5(grids))
    return found


def summed_up(found: Sequence[Verdict]) -> str:
    """Of one claim over seeds."""
    seen = sum(verdict.status == "seen" for verdict in found)
    if seen in (0, len(found)):
        return found[0].status
    return f"seen in {seen} of {len(found)} seeds"


def claims(study: Study) -> list[str]:
    found = verdicts(study)
    lines = ["| | claim | seen here? |", "|---|---|---|"]
    lines += [f"| {c.id} | {c.statement} | {summed_up(found[c.id])} |" for c in rules.CLAIMS]
    told = [
        rules.TRANSFER_RULE,
        "M3 is seen if the skill has not arrived.",
        found["M4"][0].rule,
        found["M5"][0].rule,
    ]
    lines += ["", f"Rules: {' '.join(told)}", ""]
    for claim in rules.CLAIMS:
        for seed, verdict in zip(study.seeds, found[claim.id], strict=True):
            lines.append(f"- {claim.id}, seed {seed}: {verdict.status}. {verdict.evidence}")
    return lines


def claim_records(told: Json) -> list[Json]:
    """The verdicts as docs/claims.py lists them."""
    study = Study(told)
    records = []
    for name, found in verdicts(study).items():
        evidence = " ".join(f"Seed {s}: {v.evidence}" for s, v in zip(study.seeds, found, strict=True))
        rule = found[0].rule
        setting = f"injection study: {len(study.records)} operators on {told.get('models', 'digits')}"
        records.append(
            {"claim": name, "status": summed_up(found), "rule": rule, "evidence": evidence,
             "seeds": study.seeds, "setting": setting, "command": told.get("command", COMMAND)}
        )  # fmt: skip
    return records


def validation(record: Json) -> float:
    return max(row[-2] for row in record["points"])


def rescaling(study: Study) -> list[str]:
    pairs = [(f"dare_{kind}", f"dare_{kind}_unscaled") for kind in ("linear", "ties")]
    lines = [
        *wrapped(
            """A public code for merging VLMs drops the division by the density, so the figures published
            with it may be those of `rescale: false`. Tuned, the weights can make up for the missing
            factor, as far as the grid goes:"""
        ),
        "| operator | rescaled | not rescaled | difference by cell |",
        "|---|---|---|---|",
    ]
    for one, other in pairs:
        if one in study.records and other in study.records:
            a, b = study.values(one, "target"), study.values(other, "target")
            lines.append(
                f"| `{one}` | {100 * mean(a):.1f} | {100 * mean(b):.1f} | {band(differences(a, b), 1)} |"
            )
    return [*lines, ""]


def reliably(study: Study, labels: Sequence[str]) -> list[str]:
    lines = [
        *wrapped(
            """A study of four language models, twelve checkpoints of each and sixteen benchmarks (arXiv
            2511.21437) found that of the methods that it tried only task arithmetic gains reliably. Here
            the *net gain* of an injection is what images gained less what the VLM lost of its own skill,
            in points. An operator gains reliably if the net gain of its chosen setting is above zero in
            every scenario with every seed. *Settings > 0*: without tuning, the share of all its
            settings whose net gain is above zero. *At an edge*: cells whose chosen weights end their
            list, so that better ones may lie beyond it. *Beside TA*: the mean difference of accuracy on
            images to task arithmetic over the same cells, and in how many cells it was higher."""
        ),
        "| operator | net gain | worst | cells > 0 | settings > 0 | at an edge | beside TA | higher in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = study.values("task_arithmetic", "target")
    cells = len(study.cells)
    reliable = []
    for label in labels:
        net, settings = study.net(label), study.settings(label)
        above = sum(v > 0 for v in net)
        if above == cells:
            reliable.append(label)
        apart = differences(study.values(label, "target"), base)
        share = sum(v > 0 for v in settings) / len(settings)
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
        beside = "" if label == "task_arithmetic" else f"{100 * mean(apart):+.1f} ± {100 * error:.1f}"
        higher = "" if label == "task_arithmetic" else f"{sum(v > 0 for v in apart)} of {cells}"
        lines.append(
            f"| `{label}` | {100 * mean(net):+.1f} | {100 * min(net):+.1f} | {above} of {cells} | "
            f"{100 * share:.0f} % | {study.at_an_edge(label)} of {cells} | {beside} | {higher} |"
        )
    others = [label for label in reliable if label != "task_arithmetic"]
    if "task_arithmetic" not in reliable:
        verdict = "Not seen here: task arithmetic itself does not gain in every cell"
    elif others:
        verdict = f"Not seen here: {len(others)} of {len(labels) - 1} other operators gain in every cell too"
    else:
        verdict = "Seen here: no other operator gains in every cell"
    told = "Settings were tuned on a validation split of the same task; ± is one standard error over cells."
    return [*lines, "", f"**{verdict}.** {told}", ""]


def draw_operators(study: Study) -> Any:
    labels = study.ranked()[::-1]
    figure, grid = canvas(9.6, 0.9 + 0.22 * len(labels), columns=3, sharey=True)
    for axes, (scenario, (_, title, _)) in zip(grid[0], SCENARIOS.items(), strict=True):
        for i, label in enumerate(labels):
            values = study.values(label, "target", scenario)
            colour = next((c for name, c in FAMILY.items() if label.startswith(name)), FAINT)
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
