"""Sweeps: one run for every combination of listed values, in turn, at once on one host or as an array of a
cluster, and a table of what they gave."""

import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab import distributed
from jaxlab.app import runs
from jaxlab.app.registry import Task
from jaxlab.config import parse_yaml, resolve, to_dict, yaml_line
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


def folder_of(task: Task, name: str, todo: Sequence[Point], outputs: Path) -> Path:
    """The folder of a sweep: of these points, by whichever way they run."""
    how = lambda config: getattr(config, "HOW_IT_RUNS", ())
    plain = lambda config: {k: v for k, v in to_dict(config).items() if k not in how(config)}
    identity = json.dumps([[point.values, plain(point.config)] for point in todo], sort_keys=True)
    return outputs / "sweeps" / runs.hashed_name(f"{task.name}-{name}", identity)


def run(task: Task, name: str, todo: Sequence[Point], *, outputs: Path, overwrite: bool) -> int:
    """Runs the points one after the other, each in its own run folder; finished ones are not done again.

    A point that fails is noted, and the others run. `<outputs>/sweeps/<task>-<name>-<8 hex>/sweep.json` is
    brought up to date after every point.

    Returns:
      The exit status: 0, 2 if a point failed by a mistake of the user, 1 if by anything else.
    """
    status = 0
    for index, point in enumerate(todo):
        print(f"[{index + 1}/{len(todo)}] {yaml_line(point.values)}")
        status = _worse(status, run_point(task, name, todo, index, outputs=outputs, overwrite=overwrite))
        collect(task, name, todo, outputs=outputs, upto=index + 1)
    show(task, name, todo, outputs=outputs)
    return status


def run_point(
    task: Task, name: str, todo: Sequence[Point], index: int, *, outputs: Path, overwrite: bool
) -> int:
    """Runs one point, and notes how it ended in `points/<index>.json` of the sweep's folder, which it alone
    writes: points may run at the same time.

    Returns:
      The exit status of the point alone.
    """
    point, status = todo[index], 0
    row: dict[str, Any] = {"values": point.values}
    file = folder_of(task, name, todo, outputs) / "points" / f"{index}.json"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    remove_torn(file)
    try:
        result = runs.run_config(
            task, point.config, name, point.command, outputs=outputs, overwrite=overwrite
        )
        row |= {"run": str(result.path.relative_to(outputs)), "results": result.results}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        row["error"], status = str(error), 2
    except Exception as error:  # the other points are told apart from it by the status
        traceback.print_exc()
        row["error"], status = f"{type(error).__name__}: {error}", 1
    if distributed.is_main():
        write_json(file, row)
    return status


def collect(
    task: Task, name: str, todo: Sequence[Point], *, outputs: Path, upto: int | None = None
) -> list[dict[str, Any]]:
    """What the points have given so far, in their order, written to `sweep.json`.

    Args:
      upto: only the first ones, of a sweep that goes on; None: all, of which some may not be done.
    """
    folder = folder_of(task, name, todo, outputs)
    rows = [_found(folder / "points" / f"{index}.json", point) for index, point in enumerate(todo[:upto])]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_torn(folder / "sweep.json")
    write_json(folder / "sweep.json", {"task": task.name, "runs": rows, "points": len(todo)})
    return rows


def _found(file: Path, point: Point) -> dict[str, Any]:
    """How a point ended; without "run" and "error" it has not."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(row, dict) and ("error" in row or isinstance(row.get("results"), dict)):
            return row
        raise ValueError
    except FileNotFoundError:
        return {"values": point.values}
    except (OSError, ValueError):
        return {"values": point.values, "error": f"{file}: damaged; run the point again"}


def show(task: Task, name: str, todo: Sequence[Point], *, outputs: Path) -> int:
    """Collects what there is and prints the table.

    Returns:
      How many points have failed or are not done.
    """
    rows = collect(task, name, todo, outputs=outputs)
    print(table([{**row, "results": task.shown(row.get("results", {}))} for row in rows]))
    failed = [str(i) for i, row in enumerate(rows) if "error" in row]
    missing = [str(i) for i, row in enumerate(rows) if "error" not in row and "run" not in row]
    told = [f"{len(failed)} of {len(rows)} points failed"] * bool(failed)
    told += [f"{len(missing)} are not done: --sweep-index {','.join(missing)}"] * bool(missing)
    print("; ".join([f"sweep: {folder_of(task, name, todo, outputs) / 'sweep.json'}", *told]))
    return len(failed) + len(missing)


def run_at_once(todo: Sequence[Point], command: Sequence[str], jobs: int, log_folder: Path) -> int:
    """Runs the points as processes, `jobs` at once, each with its share of this host's GPUs.

    Args:
      command: what runs one of them, when `--sweep-index` follows.
      log_folder: where what a point says goes, `<index>.log`.

    Raises:
      UserError: the GPUs cannot be shared out.
    """
    shares = share_devices(visible_devices(os.environ), jobs)
    with writing(log_folder):
        log_folder.mkdir(parents=True, exist_ok=True)
    free = list(range(jobs))
    waiting, running, status = list(range(len(todo))), dict[int, tuple[Any, int]](), 0
    try:
        while waiting or running:
            while waiting and free:
                index, slot = waiting.pop(0), free.pop(0)
                devices = shares[slot]
                told = {} if devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
                with writing(log_folder / f"{index}.log"), open(log_folder / f"{index}.log", "w") as log:
                    words = [*command, "--sweep-index", str(index)]
                    process = subprocess.Popen(
                        words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **told}
                    )
                running[index] = (process, slot)
                where = "" if devices is None else f" on GPU {','.join(devices)}"
                print(f"[{index + 1}/{len(todo)}] {yaml_line(todo[index].values)}{where}", flush=True)
            time.sleep(0.1)
            for index, (process, slot) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[index]
                free.append(slot)
                if process.returncode:
                    print(f"[{index + 1}/{len(todo)}] failed: {log_folder / f'{index}.log'}", file=sys.stderr)
                    status = _worse(status, 2 if process.returncode == 2 else 1)
    finally:
        for process, _ in running.values():  # a signal to this process is one to all
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return status


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of this host that processes may use, as CUDA_VISIBLE_DEVICES names them; no backend starts."""
    told = environment.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [device for device in told.replace(" ", "").split(",") if device]
    found = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(found, key=int)


def share_devices(devices: Sequence[str], jobs: int) -> list[list[str] | None]:
    """The devices of each of several jobs, equally many; None: there are none to share.

    Raises:
      UserError: there are fewer devices than jobs.
    """
    if not devices:
        return [None] * jobs
    if len(devices) < jobs:
        raise UserError(f"--sweep-jobs {jobs} on {len(devices)} GPUs: a point needs one of its own")
    each = len(devices) // jobs
    return [list(devices[job * each : (job + 1) * each]) for job in range(jobs)]


def index_of(text: str, points: int, environment: Mapping[str, str]) -> list[int]:
    """The points that `--sweep-index` names: numbers from 0 with commas, or `auto`, a SLURM array's task.

    Raises:
      UserError: there are no such points.
    """
    if text == "auto":
        told = environment.get("SLURM_ARRAY_TASK_ID", "")
        if not told:
            raise UserError("--sweep-index auto: SLURM_ARRAY_TASK_ID is not set; start it by sbatch --array")
        text = told
    found = []
    for part in text.split(","):
        if not (part.isascii() and part.isdecimal() and len(part) < 8 and int(part) < points):
            raise UserError(
                f"--sweep-index {text[:80]}: the sweep has points 0 to {points - 1}; name some, with commas"
            )
        found.append(int(part))
    return found


def array_script(task: Task, name: str, points: int, command: str, outputs: str) -> str:
    """A script for `sbatch` that runs each point of a sweep as a task of an array."""
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Submit by `sbatch`; afterwards the table: {command} --sweep-collect",
            f"#SBATCH --job-name={runs.safe_name(f'{task.name}-{name}')}",
            f"#SBATCH --array=0-{points - 1}",
            "#SBATCH --ntasks=1",
            "#SBATCH --gpus-per-task=1",
            "#SBATCH --time=24:00:00",
            "#SBATCH --signal=TERM@120  # time to save a checkpoint; requeued tasks go on from it",
            "#SBATCH --requeue",
            f"#SBATCH --output={shlex.quote(f'{outputs}/slurm-%A_%a.log')}",
            "set -euo pipefail",
            f"mkdir -p {shlex.quote(outputs)}",
            f"srun {command} --sweep-index auto",
            "",
        ]
    )


def _worse(status: int, other: int) -> int:
    """Of two exit statuses: a bug's, then a user's mistake's."""
    return next((code for code in (1, 2) if code in (status, other)), 0)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a sweep in columns: what was set, the first scalar results, the run folder or what went
    wrong."""
    scalars = list(dict.fromkeys(key for row in rows for key in _scalars(row["results"])))[:6]
    head = [*rows[0]["values"], *scalars, "run"]
    body = [
        [
            *map(_cell, row["values"].values()),
            *(_cell(row["results"][key]) if key in row["results"] else "" for key in scalars),
            row["run"]
            if "run" in row
            else f"failed: {' '.join(row['error'].split())}"[:80]
            if "error" in row
            else "not done",
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
