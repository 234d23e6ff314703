"""The part of the page for runs of any task: their curves and their numbers."""

from collections.abc import Sequence
from typing import Any

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder, distinct_labels
from jaxlab.reporting.formats import NONE, count, decimal
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import Section, figure, heading, table

_MOST = 40
"""Numbers of one run that are shown; a results.json of many more belongs to a section of its own."""


def build(runs: Sequence[RunFolder]) -> Section | None:
    """A section with every run under its own heading, or None without runs."""
    if not runs:
        return None
    titles = {run.label for run in runs}
    title = runs[0].label if len(titles) == 1 else "Other runs"
    section = Section("runs", "Runs", title, _headline(runs))
    if (together := _curves_together(runs)) is not None:
        section.body.append(together)
    for index, run in enumerate(runs):
        if len(runs) > 1:
            section.body.append(heading(f"{run.label} ({run.task})"))
        section.body += [p for p in (_curves(run, index), _positions(run, index), _numbers(run)) if p]
    section.runs = list(runs)
    return section


def _headline(runs: Sequence[RunFolder]) -> tuple[str, str]:
    if len(runs) == 1:
        for keys, said in ((("test", "eval_loss"), "test loss"), (("loss",), "loss")):
            value = runs[0].get(*keys)
            if isinstance(value, int | float):
                return decimal(value), said
    return str(len(runs)), "run" if len(runs) == 1 else "runs"


def _curves(run: RunFolder, index: int) -> Markup | None:
    training, held_out = run.curve("loss"), run.curve("eval_loss")
    if not training[0]:
        return None
    drawing = plots.loss_figure({run.label: [training]}, {run.label: [held_out]})
    return figure(
        drawing,
        f"run-{index}-loss",
        "Loss while training.",
        "Right: on data that the model was not trained on.",
    )


def _positions(run: RunFolder, index: int) -> Markup | None:
    """The loss by position of an evaluation on text."""
    points = [
        ((p["first"] + p["last"]) / 2, p["loss"])
        for p in run.get("by_position") or []
        if p["loss"] is not None
    ]
    if len(points) < 2:
        return None
    return figure(
        plots.position_figure({run.label: points}, "nats per token"),
        f"run-{index}-position",
        "Loss by position.",
        "Falling to the right means that the model uses text from far before. Of packed texts positions "
        "count from the start of each.",
    )


def _curves_together(runs: Sequence[RunFolder]) -> Markup | None:
    """The curves of all runs that have one, on one scale; of one run alone there is its own figure."""
    trained = [run for run in runs if run.curve("loss")[0]]
    if len(trained) < 2:
        return None
    named = dict(zip(distinct_labels(trained), trained, strict=True))
    training, held_out = (
        {name: [run.curve(key)] for name, run in named.items()} for key in ("loss", "eval_loss")
    )
    drawing = plots.loss_figure(training, held_out)
    return figure(
        drawing,
        "runs-loss",
        "Loss while training, of all runs.",
        "Right: on data that the models were not trained on.",
    )


def _numbers(run: RunFolder) -> Markup | None:
    rows = flat(run.results)
    shown = [[name, _shown(value)] for name, value in rows[:_MOST]]
    if not shown:
        return None
    look = "" if len(rows) <= _MOST else f"The first {_MOST} of {len(rows)}; the others are in results.json."
    return table(["result", "value"], shown, "Results.", look)


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Scalars of nested dicts by dotted name; lists are left to results.json."""
    if isinstance(value, dict):
        return [
            pair
            for key, item in value.items()
            for pair in flat(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if isinstance(value, list) else [(prefix, value)]


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool | str):
        return str(value)
    return count(value) if float(value).is_integer() else f"{value:.4g}"
