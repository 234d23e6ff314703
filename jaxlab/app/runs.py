"""Run folders: what a task leaves behind, when it is taken up again and when it is not done twice.

A run lives in `<outputs>/<task>/<config name>-<8 hex>/`. The hash covers the task, the resolved config, the
identities of its inputs, the package version and, in a git checkout, the commit; with uncommitted changes of
the code it covers these too. So a folder belongs to one state of the code:

- With results.json in it the run is done; `run_config` returns its results, unless `overwrite` is asked
  for or the code has uncommitted changes. From changed code nothing finished is reused: the run is done anew.
- Without results.json the run was interrupted, by the same code on the same config. The folder is kept, so
  that a task which writes checkpoints continues from its own. This holds for changed code too: the hash says
  it is the same change.
- A lock keeps two processes from writing one folder; it goes with the process, however that ends.
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlab import config as configs
from jaxlab.app import provenance
from jaxlab.app.program import program
from jaxlab.app.registry import Task
from jaxlab.errors import UserError
from jaxlab.files import jsonable, write_atomic, write_json

_LOCK = ".lock"


class Run:
    """The folder of a run under way: `path` to write into, `log` for metrics."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._next_step = 0
        self._continued = False

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def rewind(self, step: int) -> None:
        """Declares that the run continues at `step`: metrics of that step and later ones are dropped.

        A task that resumes from a checkpoint calls this before it logs; otherwise the first `log` starts a
        new file.
        """
        kept = [record for record in read_metrics(self.path) if record["step"] < step]
        write_atomic(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))
        self._next_step = step
        self._continued = True

    def log(self, *, step: int | None = None, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl. Steps count on from the last one where none is given."""
        if not self._continued:
            self.rewind(0)
        step = self._next_step if step is None else step
        self._next_step = step + 1
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable({"step": step, **metrics}), allow_nan=False) + "\n")

    def finish(self, results: dict[str, Any]) -> None:
        """Writes results.json, atomically and last: where it is, the run is done."""
        write_json(self.path / "results.json", results)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its results, and whether they were there before."""

    path: Path
    results: dict[str, Any]
    reused: bool = False


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl; a last line torn by a kill is left out."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The results of a run folder.

    Raises:
      UserError: the run is not finished or the file is damaged.
    """
    file = Path(path) / "results.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no results.json; is this the folder of a finished run?") from None
    except ValueError:
        raise UserError(
            f"{file}: not the JSON that a run writes; remove the folder or use --overwrite"
        ) from None


def run_config(
    task: Task,
    config: Any,
    name: str,
    command: str = "",
    *,
    outputs: str | os.PathLike[str],
    overwrite: bool,
) -> RunResult:
    """Runs a config task, or returns the results of the same run if it is done.

    Args:
      name: the config's part of the folder name.
      command: what is noted as the command that made the run.
      outputs: the folder that run folders go to.
      overwrite: whether to do a finished run anew.

    Raises:
      UserError: the user's mistakes.
      Exception: whatever the task raises.
    """
    module = task.load()
    inputs = dict(module.inputs(config)) if hasattr(module, "inputs") else {}
    folder = Path(outputs) / task.name / run_name(task.name, config, name, inputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made: {error.strerror}; choose another place with --outputs"
        ) from None
    with _locked(folder):
        if (folder / "results.json").exists():
            if not overwrite and not provenance.code().dirty:
                print(f"already done: {folder} (--overwrite does it anew)")
                return RunResult(folder, read_results(folder), reused=True)
            print(
                f"done anew, {'--overwrite' if overwrite else 'the code has uncommitted changes'}: {folder}"
            )
            _clear(folder)
        elif overwrite:
            print(f"run: {folder}")
            _clear(folder)
        else:
            print(f"{'taken up again' if (folder / 'env.json').exists() else 'run'}: {folder}")
        command = command or command_line(task.name, str(folder / "config.yaml"))
        return _run(task, config, Run(folder, folder.name), inputs, command)


def _run(task: Task, config: Any, run: Run, inputs: dict[str, str], command: str) -> RunResult:
    write_atomic(run.path / "config.yaml", f"# {command}\n{configs.dump(config)}")
    started = time.time()
    facts = {"task": task.name, "command": command, "inputs": inputs, **provenance.environment()}
    facts["interrupted"] = _earlier_starts(run.path)
    write_json(run.path / "env.json", {**facts, "started": _clock(started)})
    results = jsonable(task.load().run(config, run))
    if not isinstance(results, dict):
        raise TypeError(f"{task.module}.run returned {type(results).__name__}, not a dict")
    finished = time.time()
    times = {
        "started": _clock(started),
        "finished": _clock(finished),
        "seconds": round(finished - started, 3),
    }
    write_json(run.path / "env.json", {**facts, **times})
    run.finish(results)
    return RunResult(run.path, results)


def _earlier_starts(folder: Path) -> list[str]:
    """When the run was begun before, without coming to an end."""
    file = folder / "env.json"
    if not file.exists():
        return []
    before = json.loads(file.read_text(encoding="utf-8"))
    return [*before["interrupted"], before["started"]]


def command_line(task_name: str, *words: str) -> str:
    """The line that a shell takes to run a task with `words`."""
    return f"{program()} {shlex.join([task_name, *words])}"


def run_name(task_name: str, config: Any, name: str, inputs: dict[str, str]) -> str:
    """The folder name of a run: the config's name and a short hash of all that decides its results."""
    code = provenance.code()
    identity = [task_name, configs.to_dict(config), inputs, code.version, code.commit, code.changes]
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashed_name(name, text)


def hashed_name(name: str, identity: str) -> str:
    """A folder name: `name` in letters that every file system takes, and a short hash of `identity`."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"
    return f"{safe}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work on this run; wait for it or use --outputs"
            ) from None
        yield


def _clear(folder: Path) -> None:
    (folder / "results.json").unlink(missing_ok=True)  # first: half cleared must not look done
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
