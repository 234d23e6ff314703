"""One entry of a search, an operator with a method: points asked for, measured, written down, one chosen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlab.costs import let_go_of_programs
from jaxlab.errors import UserError
from jaxlab.merging.search import gradient
from jaxlab.merging.search.choice import Way, choose, choose_keeping, mean_of, pareto
from jaxlab.merging.search.evaluator import Evaluator, Measured, OnModel
from jaxlab.merging.search.journal import Journal
from jaxlab.merging.search.measures import ANSWERS, SCORE, Data, Measure
from jaxlab.merging.search.samplers import make_sampler
from jaxlab.merging.search.space import Point, Space

DETAILS = "details"
"""Measures of a data set besides its score, as `DETAILS/name`."""


class Split(NamedTuple):
    """What is measured on one split."""

    data: Data
    """Of the data sets whose batches are measured in the program that merges."""
    on_model: tuple[OnModel, ...] = ()
    """Of the others."""


class Measuring(NamedTuple):
    """What is measured of every point, and what it is chosen by."""

    measure: Measure | None
    validation: Split
    test: Split
    choose: tuple[str, ...]
    """The data sets whose mean score is the skill to be gained."""
    keep: tuple[str, ...] = ()
    """The data sets whose mean score is the skill to be kept."""
    ways: tuple[Way, ...] = ("labels",)
    """How a point is chosen; the first one decides which is best."""
    least_kept: float | None = None
    """Choose by labels among points that keep so much."""


class Effort(NamedTuple):
    """What every entry of a search has the same of."""

    evaluations: int
    seed: int
    profile: Sequence[float] | None = None
    """Over layers, for `layers: flows`."""
    batches: gradient.Batches | None = None
    """What method gradient learns on."""


def search_entry(
    label: str,
    space: Space,
    evaluator: Evaluator,
    measuring: Measuring,
    effort: Effort,
    journal: Journal,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Every point of an entry on validation data, and the chosen ones on test data; what the journal holds of
    it already is not measured again.

    Raises:
      UserError: the journal holds another search.
    """
    if space.method == "gradient":
        rows = _by_gradient(label, space, evaluator, measuring, effort, journal, progress)
    else:
        rows = _by_sampler(label, space, evaluator, measuring, effort, journal, progress)
    chosen: dict[str, int] = {}
    for way in measuring.ways:
        by_labels = way == "labels"
        chosen[way] = (
            choose_keeping(rows, measuring.least_kept)
            if by_labels
            else choose(rows, way, measuring.choose, space)
        )
    tests = {row["index"]: row["test"] for row in journal.rows(label, "test")}
    missing = [i for i in dict.fromkeys(chosen.values()) if i not in tests]
    if missing:
        points = [space.point_of_row(rows[i]) for i in missing]
        split = measuring.test
        measured = evaluator(space.operator, points, measuring.measure, split.data, split.on_model)
        made = [{"index": i, **_shown(m, "test")} for i, m in zip(missing, measured, strict=True)]
        tests |= {row["index"]: row["test"] for row in journal.add(label, "test", made)}
    ways = {way: {"index": i, **_public(rows[i]), "test": tests[i]} for way, i in chosen.items()}
    return {
        "operator": space.operator,
        "method": space.method,
        "layers": space.layers,
        "evaluations": effort.evaluations,
        "points": [_public(row) for row in rows],
        "chosen": ways,
        "best": ways[measuring.ways[0]],
        **({"pareto": pareto(rows)} if measuring.keep else {}),
    }


def _by_sampler(
    label: str,
    space: Space,
    evaluator: Evaluator,
    measuring: Measuring,
    effort: Effort,
    journal: Journal,
    progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    sampler = make_sampler(space, effort.evaluations, evaluator.plan.num_layers, effort.seed, effort.profile)
    known, rows = journal.rows(label, "point"), list[dict[str, Any]]()
    # Those that learn from a score are asked for one point after the other; without a program that measures
    # several, a point is minutes that a kill shall not lose.
    together = measuring.measure is not None and space.method in ("grid", "random")
    at_once = evaluator.chunk if together else 1
    while len(rows) < effort.evaluations:
        points = sampler.ask(min(at_once, effort.evaluations - len(rows)))
        done = [_known_row(journal, known, len(rows) + i, point, measuring) for i, point in enumerate(points)]
        fresh = [point for point, row in zip(points, done, strict=True) if row is None]
        progress(len(points) - len(fresh))
        if fresh:
            split = measuring.validation
            measured = evaluator(
                space.operator, fresh, measuring.measure, split.data, split.on_model, progress
            )
            first = len(rows) + len(points) - len(fresh)
            made = [
                {"index": first + i, **_row(point, m, measuring)}
                for i, (point, m) in enumerate(zip(fresh, measured, strict=True))
            ]
            done = [*(row for row in done if row is not None), *journal.add(label, "point", made)]
        rows += [row for row in done if row is not None]
        sampler.tell([row["score"] for row in rows[len(rows) - len(points) :]])
        let_go_of_programs()
    return rows


def _by_gradient(
    label: str,
    space: Space,
    evaluator: Evaluator,
    measuring: Measuring,
    effort: Effort,
    journal: Journal,
    progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    batches = effort.batches
    if batches is None:
        raise UserError("method gradient learns on right answers; choose names no data set that has any")
    passes = gradient.PASSES[space.loss]
    schedule = gradient.Schedule.of(effort.evaluations, passes, len(batches.batches))
    assert schedule.measured + schedule.steps * passes / len(batches.batches) <= effort.evaluations
    layers = evaluator.plan.num_layers
    state = gradient.start(space, layers)
    known, rows, done = journal.rows(label, "point"), list[dict[str, Any]](), 0
    for number in range(schedule.measured):
        until = schedule.until(number)
        if number < len(known):
            try:
                state = gradient.State(*(np.asarray(x, np.float32) for x in known[number]["state"]))
                if any(x.shape != y.shape for x, y in zip(state, gradient.start(space, layers), strict=True)):
                    raise ValueError("of other layers")
            except (KeyError, TypeError, ValueError):
                raise _other_points(journal) from None
            row = _known_row(journal, known, number, gradient.point_at(space, state), measuring)
            assert row is not None
            rows.append(row)
        else:
            point = gradient.point_at(space, state)
            method = evaluator.method(space.operator, point)
            state, losses = gradient.descend(
                evaluator.plan,
                method,
                evaluator.trio.config,
                evaluator.trio.vlm,
                evaluator.prepared(method),
                space,
                batches,
                state,
                done,
                until,
            )
            point, split = gradient.point_at(space, state), measuring.validation
            (measured,) = evaluator(space.operator, [point], measuring.measure, split.data, split.on_model)
            learned = {
                "steps": until,
                "loss": float(np.mean(losses)) if losses else None,
                "state": [np.asarray(x).tolist() for x in state],
            }
            made = {"index": number, **_row(point, measured, measuring), **learned}
            rows += journal.add(label, "point", [made])
        done = until
        let_go_of_programs()
        progress(
            effort.evaluations * (number + 1) // schedule.measured
            - effort.evaluations * number // schedule.measured
        )
    return rows


def _known_row(
    journal: Journal, known: Sequence[dict[str, Any]], index: int, point: Point, measuring: Measuring
) -> dict[str, Any] | None:
    """What the journal holds of a point.

    Raises:
      UserError: at its place another one.
    """
    if index >= len(known):
        return None
    row = known[index]
    measured = row.get("validation")
    whole = isinstance(measured, dict) and {*measuring.choose, *measuring.keep} <= measured.keys()
    if not whole or any(row.get(name) != value for name, value in point.as_row().items()):
        raise _other_points(journal)
    return row


def _other_points(journal: Journal) -> UserError:
    return UserError(f"{journal.path}: holds other points than this search asks for; use --overwrite")


def _row(point: Point, measured: Measured, measuring: Measuring) -> dict[str, Any]:
    row = {**point.as_row(), **_shown(measured, "validation")}
    row["score"] = mean_of(row, "validation", measuring.choose)
    if measuring.keep:
        row["kept"] = mean_of(row, "validation", measuring.keep)
    return row


def _shown(measured: Measured, split: str) -> dict[str, Any]:
    """What was measured, by what it is and then by data set; of the test split the scores alone."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in measured.items():
        what, _, name = key.partition("/")
        if what == SCORE:
            found.setdefault(split, {})[name] = value
        elif what == DETAILS or split != "test":
            found.setdefault(what, {})[name] = value
    return found


def _public(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the journal without what only a search that goes on needs."""
    hidden = ("entry", "kind", "index", "state", ANSWERS)
    return {name: value for name, value in row.items() if name not in hidden}
