"""A run folder as a report sees it: four files, read once, never written."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from jaxlab.app import read_metrics, read_results
from jaxlab.errors import UserError
from jaxlab.reporting.formats import Number

MOST_SETTINGS = 3
"""So many settings at most tell runs of one name apart."""


@dataclass(frozen=True)
class RunFolder:
    """What config.yaml, env.json, metrics.jsonl and results.json of a run hold."""

    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    results: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def label(self) -> str:
        """The name without the hash: `nsa_full` of `nsa_full-1a2b3c4d`."""
        stem, dash, digest = self.name.rpartition("-")
        return stem if dash and len(digest) == 8 else self.name

    @property
    def task(self) -> str:
        return str(self.env.get("task", self.path.parent.name))

    @property
    def command(self) -> str:
        return str(self.env.get("command", ""))

    @property
    def seconds(self) -> Number | None:
        return self.env.get("seconds")

    def is_named_by(self, reference: object) -> bool:
        """Whether a config that names a model means this run's: by folder, or by the config that made it."""
        path = PurePath(str(reference).replace("\\", "/"))
        return self.name in path.parts or (path.suffix in (".yaml", ".yml") and path.stem == self.label)

    def get(self, *keys: str | int) -> Any:
        """A value of the results by its path of keys, None where the path ends early."""
        return at(self.results, *keys)

    def setting(self, *keys: str) -> Any:
        """A value of the config by its path of keys, None where the path ends early."""
        return at(self.config, *keys)

    def curve(self, key: str) -> tuple[list[Number], list[Number]]:
        """Steps and values of one metric."""
        points = [(m["step"], m[key]) for m in self.metrics if m.get(key) is not None]
        return [p[0] for p in points], [p[1] for p in points]


def distinct_labels(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its label, and where others have that too, the settings in which their configs
    differ (of paths the last part, where it tells them apart); the folder's name where none does."""
    found = []
    for run in runs:
        alike = [other for other in runs if other.label == run.label]
        if len(alike) == 1:
            found.append(run.label)
            continue
        flat = [_flat(other.config) for other in alike]
        keys = sorted({key for one in flat for key in one})
        differing = [key for key in keys if len({one.get(key) for one in flat}) > 1]
        told = []
        for key in differing[:MOST_SETTINGS]:
            ends = {value: PurePath(value).name or value for one in flat if (value := one.get(key, ""))}
            own = _flat(run.config).get(key, "")
            told.append(f"{key} {ends.get(own, own) if len(set(ends.values())) == len(ends) else own}")
        found.append(f"{run.label} ({', '.join(told)})" if told else run.name)
    return [name if found.count(name) == 1 else run.name for name, run in zip(found, runs, strict=True)]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in _flat(x, f"{prefix}.{key}").items()}
    return {prefix.removeprefix("."): str(value)}


def at(value: Any, *keys: str | int) -> Any:
    """Follows keys into nested dicts and lists; None where the way ends."""
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
            value = value[key]
        else:
            return None
    return value


def read_run(path: Path) -> RunFolder:
    """Reads a finished run.

    Raises:
      UserError: results.json is missing or a file is damaged.
    """
    results = read_results(path)
    try:
        env = json.loads(_read(path / "env.json") or "{}")
        config = yaml.safe_load(_read(path / "config.yaml") or "{}") or {}
        metrics = read_metrics(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: a file of the run is damaged ({error})") from error
    for name, told in (("env.json", env), ("config.yaml", config)):
        if not isinstance(told, dict):
            raise UserError(f"{path}: a file of the run is damaged ({name} holds no mapping)")
    return RunFolder(path, config, env, results, metrics)


def read_runs(paths: Iterable[str | Path]) -> list[RunFolder]:
    """Reads run folders in order, each once; the folder of a quickstart stands for itself and its stages.

    Raises:
      UserError: one is not finished, or damaged.
    """
    runs, left_out = read_finished(paths)
    if left_out:
        raise UserError(left_out[0])
    return runs


def read_finished(paths: Iterable[str | Path]) -> tuple[list[RunFolder], list[str]]:
    """As `read_runs`, those that are whole, and what is wrong with each of the others."""
    found: dict[Path, RunFolder] = {}
    left_out: dict[Path, str] = {}
    todo = list(map(Path, paths))
    while todo:
        path = todo.pop(0)
        if path.resolve() in found or path.resolve() in left_out:
            continue
        try:
            run = found[path.resolve()] = read_run(path)
        except UserError as error:
            left_out[path.resolve()] = str(error)
            continue
        stages = run.get("stages")
        folders = [stage.get("folder") for stage in stages or [] if isinstance(stage, dict)]
        todo[:0] = [path / folder for folder in folders if isinstance(folder, str)]
    return list(found.values()), list(left_out.values())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
