"""Sweeps: one run for every combination of listed values, in turn, and a table of what they gave."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlab.app import runs
from jaxlab.app.registry import Task
from jaxlab.config import parse_yaml, resolve, yaml_line
from jaxlab.errors import COMMAND_LINE, ConfigError
from jaxlab.files import write_json

Values = dict[str, Any]
"""What one point of a sweep sets, by dotted key."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One point: the values it sets, its whole config, and the command that runs it alone."""

    values: Values
    config: Any
    command: str


def points(schema: type, sweep: Sequence[str], mode: str) -> list[Values]:
    """The points of `key=[a,b] ...`: the product of the lists, or with `mode="zip"` their first values, their
    second ones, and so on. Without a list there is one point that sets nothing.

    Raises:
      ConfigError: a mistake in it, with its place and the remedy.
    """
    axes: dict[str, list[Any]] = {}
    for word in sweep:
        dotted, equals, text = word.partition("=")
        values = _listed(text) if equals else []
        if not values:
            raise ConfigError(
                f"expected key=[a,b], found {word!r}; quote a list with spaces", "sweep", COMMAND_LINE
            )
        key = ".".join(resolve(schema, dotted)[0])
        if key in axes:
            raise ConfigError(f"{key} is given twice", "sweep", COMMAND_LINE)
        axes[key] = values
    if mode == "product":
        return [
            dict(zip(axes, combination, strict=True)) for combination in itertools.product(*axes.values())
        ]
    lengths = {key: len(values) for key, values in axes.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"zip needs lists of one length, found {lengths}", "sweep_mode", COMMAND_LINE)
    return [dict(zip(axes, row, strict=True)) for row in zip(*axes.values(), strict=True)] or [{}]


def _listed(text: str) -> list[Any]:
    try:
        values = parse_yaml(text, "")[0]
    except ConfigError:
        return []
    return values if isinstance(values, list) else []


def run(task: Task, name: str, todo: Sequence[Point], *, outputs: Path, overwrite: bool) -> Path:
    """Runs the points one after the other, each in its own run folder; finished ones are not done again.

    Returns `<outputs>/sweeps/<task>-<name>-<8 hex>/sweep.json`, brought up to date after every point.
    """
    identity = json.dumps([point.command for point in todo])
    folder = outputs / "sweeps" / runs.hashed_name(f"{task.name}-{name}", identity)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, point in enumerate(todo, 1):
        print(f"[{index}/{len(todo)}] {yaml_line(point.values)}")
        result = runs.run_config(
            task, point.config, name, point.command, outputs=outputs, overwrite=overwrite
        )
        rows.append(
            {"values": point.values, "run": str(result.path.relative_to(outputs)), "results": result.results}
        )
        write_json(folder / "sweep.json", {"task": task.name, "runs": rows, "points": len(todo)})
    print(table(rows))
    print(f"sweep: {folder / 'sweep.json'}")
    return folder / "sweep.json"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a sweep in columns: what was set, the first scalar results, the run folder."""
    scalars = [key for key, value in rows[0]["results"].items() if isinstance(value, int | float | str)][:6]
    head = [*rows[0]["values"], *scalars, "run"]
    body = [
        [
            *map(_cell, row["values"].values()),
            *(_cell(row["results"].get(key)) for key in scalars),
            row["run"],
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in [head, *body]
    ]
    return "\n".join(line.rstrip() for line in lines)


def summary(results: dict[str, Any]) -> str:
    """The scalar results in one line."""
    return ", ".join(
        f"{key} {_cell(value)}" for key, value in results.items() if isinstance(value, int | float | str)
    )


def _cell(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
        if isinstance(value, str)
        else yaml_line(value)
    )
