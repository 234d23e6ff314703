"""Which of the measured points is taken: by labels, or without any."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxlab.errors import ConfigError
from jaxlab.merging.search.measures import ANSWERS, ENTROPY
from jaxlab.merging.search.space import Interval, Space

Way = Literal["labels", "entropy", "neighbours"]
"""labels: the highest mean score. entropy: the model surest of its own answers. neighbours: the answers that
change least to the neighbouring points."""

Row = Mapping[str, Any]
"""A point as it is written down: its values, what was measured, and its score."""


def choose(rows: Sequence[Row], way: Way, names: Sequence[str], space: Space) -> int:
    """The index of the point that a way takes; the first of equals.

    Args:
      rows: in the order of the points.
      names: the data sets that decide.
      space: of a grid, for `neighbours`.
    """
    if way == "labels":
        return _best([row["score"] for row in rows])
    if way == "entropy":
        return _best([-mean_of(row, ENTROPY, names) for row in rows])
    return _best([-x for x in differences(rows, names, space)])


def choose_keeping(rows: Sequence[Row], least: float | None) -> int:
    """The index of the highest score among points whose kept skill is at least `least`; where none is, of the
    point that keeps most."""
    if least is None:
        return _best([row["score"] for row in rows])
    enough = [row["score"] if row["kept"] >= least else -np.inf for row in rows]
    return _best(enough) if max(enough) > -np.inf else _best([row["kept"] for row in rows])


def differences(rows: Sequence[Row], names: Sequence[str], space: Space) -> list[float]:
    """For each point of a grid the share of a data set's own answers in which it differs from its neighbours
    on the grid, averaged over neighbours and data sets; after AdaMMS (arXiv 2503.23733), which has one
    weight.

    A neighbour is one step away along one axis that has an order. A point without neighbours gets 1.
    """
    dimensions = {n: v for n, v in space.dimensions.items() if not isinstance(v, Interval)}
    ordered = {n: sorted(set(v)) for n, v in dimensions.items() if not any(isinstance(x, bool) for x in v)}
    keys = [{name: row[name] for name in dimensions} for row in rows]
    place = {_key(key): i for i, key in enumerate(keys)}
    result = []
    for i, key in enumerate(keys):
        near = []
        for name, values in ordered.items():
            at = values.index(key[name])
            for step in (at - 1, at + 1):
                if 0 <= step < len(values):
                    near.append(place[_key({**key, name: values[step]})])
        found = [
            float(np.mean(np.asarray(rows[i][ANSWERS][name]) != np.asarray(rows[j][ANSWERS][name])))
            for j in near
            for name in names
        ]
        result.append(float(np.mean(found)) if found else 1.0)
    return result


def check_way(way: Way, space: Space) -> None:
    """Whether a way can choose in a space.

    Raises:
      ConfigError: it cannot.
    """
    if way == "neighbours" and space.method != "grid":
        raise ConfigError(f"neighbours need a grid; method is {space.method}", key="method")
    if way == "neighbours" and len(space.points()) < 2:
        raise ConfigError("neighbours need a grid of at least two points", key="lambda_e")


def pareto(rows: Sequence[Row]) -> list[int]:
    """The indices of points that no other beats in gained and kept skill at once, by rising gain."""
    gained, kept = ([float(row[name]) for row in rows] for name in ("score", "kept"))
    front = [
        i
        for i in range(len(rows))
        if not any(
            gained[j] >= gained[i] and kept[j] >= kept[i] and (gained[j], kept[j]) != (gained[i], kept[i])
            for j in range(len(rows))
        )
    ]
    return sorted(front, key=lambda i: gained[i])


def mean_of(row: Row, what: str, names: Sequence[str]) -> float:
    """The mean of something measured over data sets; NaN where one has no value."""
    return float(np.mean([np.nan if row[what][name] is None else row[what][name] for name in names]))


def _best(scores: Sequence[float]) -> int:
    finite = [score if score == score else -np.inf for score in scores]
    return max(range(len(finite)), key=finite.__getitem__)


def _key(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(values.items()))
