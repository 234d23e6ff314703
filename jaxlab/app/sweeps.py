"""Sweeps: one run for every combination of listed values, in turn, and a table of what they gave."""

import dataclasses
import itertools
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlab.app import runs
from jaxlab.app.registry import Task
from jaxlab.config import parse_yaml, resolve, yaml_line
from jaxlab.errors import COMMAND_LINE, ConfigError, UserError
from jaxlab.files import remove_torn, write_json, writing

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


def run(task: Task, name: str, todo: Sequence[Point], *, outputs: Path, overwrite: bool) -> int:
    """Runs the points one after the other, each in its own run folder; finished ones are not done again.

    A point that fails is noted, and the others run. `<outputs>/sweeps/<task>-<name>-<8 hex>/sweep.json` is
    brought up to date after every point.

    Returns:
      The exit status: 0, 2 if a point failed by a mistake of the user, 1 if by anything else.
    """
    identity = json.dumps([point.command for point in todo])
    folder = outputs / "sweeps" / runs.hashed_name(f"{task.name}-{name}", identity)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_torn(folder / "sweep.json")
    rows: list[dict[str, Any]] = []
    status = 0
    for index, point in enumerate(todo, 1):
        print(f"[{index}/{len(todo)}] {yaml_line(point.values)}")
        row: dict[str, Any] = {"values": point.values}
        try:
            result = runs.run_config(
                task, point.config, name, point.command, outputs=outputs, overwrite=overwrite
            )
            row |= {"run": str(result.path.relative_to(outputs)), "results": result.results}
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            row["error"], status = str(error), status or 2
        except Exception as error:  # the other points are told apart from it by the status
            traceback.print_exc()
            row["error"], status = f"{type(error).__name__}: {error}", 1
        rows.append(row)
        write_json(folder / "sweep.json", {"task": task.name, "runs": rows, "points": len(todo)})
    print(table([{**row, "results": task.shown(row.get("results", {}))} for row in rows]))
    failed = sum("error" in row for row in rows)
    print(f"sweep: {folder / 'sweep.json'}{f'; {failed} of {len(rows)} points failed' if failed else ''}")
    return status


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a sweep in columns: what was set, the first scalar results, the run folder or what went
    wrong."""
    scalars = list(dict.fromkeys(key for row in rows for key in _scalars(row["results"])))[:6]
    head = [*rows[0]["values"], *scalars, "run"]
    body = [
        [
            *map(_cell, row["values"].values()),
            *(_cell(row["results"][key]) if key in row["results"] else "" for key in scalars),
            row["run"] if "run" in row else f"failed: {' '.join(row['error'].split())}"[:80],
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
    return ", ".join(f"{key} {_cell(value)}" for key, value in _scalars(results).items())


def _scalars(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if isinstance(value, int | float | str)}


def _cell(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
        if isinstance(value, str)
        else yaml_line(value)
    )
