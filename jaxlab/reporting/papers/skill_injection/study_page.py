"""The page of an injection study and its figures, from what docs/injection_study.py found."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jaxlab.files import write_atomic
from jaxlab.reporting.papers.skill_injection import rules
from jaxlab.reporting.papers.skill_injection.study import (
    COMMAND,
    SCENARIOS,
    Json,
    Study,
    band,
    differences,
    mean,
    summed_up,
    verdicts,
)
from jaxlab.reporting.papers.skill_injection.study_figures import FIGURES
from jaxlab.reporting.plots import style


def write(told: Json, docs: Path) -> None:
    """Writes injection_study.md and the figures beside it."""
    study = Study(told)
    folder = docs / "injection_study"
    folder.mkdir(exist_ok=True)
    for name in FIGURES:
        save_figure(study, name, folder)
    write_atomic(docs / "injection_study.md", page(study))


def save_figure(study: Study, name: str, folder: Path) -> None:
    """Writes NAME.svg, the same bytes each time."""
    with style():
        figure = FIGURES[name](study)
        figure.set_facecolor("#fdfcfa")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


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
