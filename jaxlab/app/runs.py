"""Run folders: what a task leaves behind, when it is taken up again and when it is not done twice.

A run lives in `<outputs>/<task>/<config name>-<8 hex>/`. The hash covers the task, the resolved config but
for how it is run (its class names these fields, `HOW_IT_RUNS`), the identities of its inputs, the package
version and, in a git checkout, the commit; with uncommitted changes of the code it covers these too. So a
folder belongs to one state of the code:

- With results.json in it the run is done; `run_config` returns its results, unless `overwrite` is asked
  for or the code has uncommitted changes. From changed code nothing finished is reused: the run is done anew.
- Without results.json the run was interrupted, by the same code on the same config. The folder is kept, so
  that a task which writes checkpoints continues from its own. This holds for changed code too: the hash says
  it is the same change.
- What is done anew removes what the run before wrote, by a list of its files; what others put into the
  folder stays, and a note says so. A run that was killed outright has no list: what was put there before it
  began stays.
- A lock keeps two processes from writing one folder; it goes with the process, however that ends. Of several
  processes of one run (jaxlab/distributed) process 0 holds it and writes; the others see the folder.
"""

import dataclasses
import datetime
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxlab import config as configs
from jaxlab import distributed
from jaxlab.app import provenance
from jaxlab.app.program import program
from jaxlab.app.registry import Task
from jaxlab.checkpoints import files_below, remove_empty
from jaxlab.errors import UserError, UserNote
from jaxlab.files import jsonable, remove_torn, write_atomic, write_json, writing

_LOCK = ".lock"
_FILES = ".files.json"
"""What a run had written when it ended, and what others had put there before it began."""
_SEEN_WITHIN = 60.0
"""Seconds in which a shared disk shows one process what another has written."""
_CONFIG, _ENV, _METRICS, _RESULTS = "config.yaml", "env.json", "metrics.jsonl", "results.json"


class Run:
    """The folder of a run under way: `path` to write into, `log` for metrics."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._next_step = 0
        self._continued = False

    @property
    def metrics_path(self) -> Path:
        return self.path / _METRICS

    def rewind(self, step: int) -> None:
        """Declares that the run continues at `step`: metrics of that step and later ones are dropped.

        A task that resumes from a checkpoint calls this before it logs; otherwise the first `log` starts a
        new file. Lines that something has damaged are dropped too, and a note says so.
        """
        records, damaged = _read_metrics(self.path)
        if damaged and step:
            warnings.warn(
                f"{self.metrics_path}: damaged in line {damaged[0]}; {len(damaged)} lines are lost",
                UserNote,
                stacklevel=2,
            )
        kept = [record for record in records if record["step"] < step]
        write_atomic(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))
        self._next_step = step
        self._continued = True

    def log(self, *, step: int | None = None, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl. Steps count on from the last one where none is given.

        Raises:
          UserError: it cannot be written.
        """
        if not self._continued:
            self.rewind(0)
        step = self._next_step if step is None else step
        self._next_step = step + 1
        line = json.dumps(jsonable({"step": step, **metrics}), allow_nan=False) + "\n"
        with writing(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(line)

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
          UserError: one is damaged.
        """
        return read_metrics(self.path)

    def finish(self, results: dict[str, Any]) -> None:
        """Writes results.json, atomically and last: where it is, the run is done."""
        write_json(self.path / _RESULTS, results)


class FollowedRun(Run):
    """The run of process 0, as the other processes have it: they write nothing."""

    def rewind(self, step: int) -> None:
        """Does nothing: process 0 drops metrics."""

    def log(self, *, step: int | None = None, **metrics: Any) -> None:
        """Does nothing: process 0 logs."""

    def finish(self, results: dict[str, Any]) -> None:
        """Does nothing: process 0 writes the results."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its results, and whether they were there before."""

    path: Path
    results: dict[str, Any]
    reused: bool = False


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl; a last line torn by a kill is left out.

    Raises:
      UserError: another line is damaged, or the file cannot be read.
    """
    records, damaged = _read_metrics(path)
    if damaged:
        raise UserError(f"{Path(path) / _METRICS}: damaged in line {damaged[0]}")
    return records


def _read_metrics(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The whole records, and the numbers of the lines that are none."""
    file = Path(path) / _METRICS
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    records: list[dict[str, Any]] = []
    damaged = []
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line.decode())
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The results of a run folder.

    Raises:
      UserError: the run is not finished or the file is damaged.
    """
    file = Path(path) / _RESULTS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no results.json; is this the folder of a finished run?") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{file}: not the JSON that a run writes; remove the folder or use --overwrite"
        ) from None
    return found


def run_config(
    task: Task,
    config: Any,
    name: str,
    command: str = "",
    *,
    outputs: str | os.PathLike[str],
    overwrite: bool,
    callbacks: Sequence[Any] = (),
) -> RunResult:
    """Runs a config task, or returns the results of the same run if it is done.

    Args:
      name: the config's part of the folder name.
      command: what is noted as the command that made the run.
      outputs: the folder that run folders go to.
      overwrite: whether to do a finished run anew.
      callbacks: what the task's `run` takes under that name; the `identity` of each is one of the run's.

    Raises:
      UserError: the user's mistakes.
      Exception: whatever the task raises.
    """
    from jaxlab.costs import let_go_of_programs  # which imports jax

    let_go_of_programs()  # of earlier runs
    with distributed.joined(getattr(config, "distributed", None)):
        module = task.load()
        inputs = dict(module.inputs(config)) if hasattr(module, "inputs") else {}
        if callbacks:
            inputs["callbacks"] = "; ".join(callback.identity for callback in callbacks)
        folder = Path(outputs) / task.name / run_name(task.name, config, name, inputs)
        work = functools.partial(module.run, callbacks=callbacks) if callbacks else module.run
        if not distributed.is_main():
            return _follow(config, folder, work)
        return _lead(task, config, folder, inputs, command, work, overwrite=overwrite)


def _lead(
    task: Task,
    config: Any,
    folder: Path,
    inputs: dict[str, str],
    command: str,
    work: Callable[[Any, Run], dict[str, Any]],
    *,
    overwrite: bool,
) -> RunResult:
    """Runs a task in its folder, or returns what is there; other processes are told which."""
    module = task.load()
    gone = hasattr(module, "still_done") and not module.still_done(config)
    reuse = not overwrite and not gone and not provenance.code().dirty
    if reuse and (folder / _RESULTS).exists():  # before anything is written: the folder may be read-only
        return _reused(folder)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made: {error.strerror}; choose another place with --outputs"
        ) from None
    with _locked(folder) as token:
        if (folder / _RESULTS).exists():
            if reuse:  # another process has just come to its end
                return _reused(folder)
            why = "what it made is gone" if gone else "the code has uncommitted changes"
            print(f"done anew, {'--overwrite' if overwrite else why}: {folder}")
            _clear(folder)
        elif overwrite:
            print(f"run: {folder}")
            _clear(folder)
        else:
            print(f"{'taken up again' if (folder / _ENV).exists() else 'run'}: {folder}")
            for file in (_CONFIG, _ENV, _METRICS, _FILES, _RESULTS):
                remove_torn(folder / file)
        distributed.share("run", {"name": folder.name, "token": token, "results": None})
        command = command or command_line(task.name, str(folder / _CONFIG))
        try:
            return _run(task, config, Run(folder, folder.name), inputs, command, work)
        except UserError:
            if new:
                _remove_unused(folder)
            raise


def _follow(config: Any, folder: Path, work: Callable[[Any, Run], dict[str, Any]]) -> RunResult:
    """The part in a run of a process that is not process 0.

    Raises:
      UserError: this process was started for another run, or does not see the folder of process 0.
    """
    warnings.simplefilter("ignore", UserNote)  # process 0 says them
    told = distributed.share("run")
    if told["name"] != folder.name:
        raise UserError(
            f"process 0 makes the run {told['name']}, this process {folder.name}; start all with the same "
            "config, data and code"
        )
    if told["results"] is not None:
        return RunResult(folder, told["results"], reused=True)
    end = time.monotonic() + _SEEN_WITHIN
    while not _holds(folder / _LOCK, told["token"]):
        if time.monotonic() > end:
            raise UserError(
                f"{folder.absolute()}: here it is not the folder of process 0; all processes need one disk "
                "that they share: choose it with --outputs"
            )
        time.sleep(0.1)
    return RunResult(folder, jsonable(work(config, FollowedRun(folder, folder.name))))


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(errors="replace") == text
    except OSError:
        return False


def _reused(folder: Path) -> RunResult:
    print(f"already done: {folder} (--overwrite does it anew)")
    results = read_results(folder)
    distributed.share("run", {"name": folder.name, "results": results})
    return RunResult(folder, results, reused=True)


def _run(
    task: Task,
    config: Any,
    run: Run,
    inputs: dict[str, str],
    command: str,
    work: Callable[[Any, Run], dict[str, Any]],
) -> RunResult:
    foreign = _foreign(run.path)
    if foreign or (run.path / _FILES).exists():  # what an earlier start wrote is no longer all of it
        write_json(run.path / _FILES, {"foreign": foreign})
    write_atomic(run.path / _CONFIG, f"# {command}\n{configs.dump(config)}")
    started = time.time()
    facts = {"task": task.name, "command": command, "inputs": inputs, **provenance.environment()}
    facts["interrupted"], before = _earlier_starts(run.path)
    write_json(run.path / _ENV, {**facts, "seconds_before": round(before, 3), "started": _clock(started)})
    try:
        results = jsonable(work(config, run))
    except BaseException:
        with suppress(UserError, OSError):  # a full disk, say: then it is as after a kill
            _list_written(run.path, foreign)
        raise
    if not isinstance(results, dict):
        raise TypeError(f"{task.module}.run returned {type(results).__name__}, not a dict")
    finished = time.time()
    times = {
        "started": _clock(started),
        "finished": _clock(finished),
        "seconds": round(before + finished - started, 3),
    }
    write_json(run.path / _ENV, {**facts, **times})
    _list_written(run.path, foreign, _RESULTS)
    run.finish(results)
    return RunResult(run.path, results)


def _list_written(folder: Path, foreign: Sequence[str], *coming: str) -> None:
    written = sorted({*files_below(folder), *coming} - {_LOCK, _FILES, *foreign})
    write_json(folder / _FILES, {"written": written, "foreign": list(foreign)})


def _foreign(folder: Path) -> list[str]:
    """What others put into a folder, as far as its list tells."""
    listed = _listed(folder)
    found = files_below(folder) - {_LOCK, _FILES}
    return sorted(
        found - {*listed["written"]} if "written" in listed else found & {*listed.get("foreign", [])}
    )


def _earlier_starts(folder: Path) -> tuple[list[str], float]:
    """When the run was begun before without coming to an end, and how many seconds it was seen at work."""
    file, metrics = folder / _ENV, folder / _METRICS
    if not file.exists():
        return [], 0.0
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        began = datetime.datetime.fromisoformat(told["started"]).timestamp()
        seen = metrics.stat().st_mtime if metrics.exists() else began
        seconds = float(told.get("seconds_before", 0.0)) + max(seen - began, 0.0)
        return [*map(str, told["interrupted"]), str(told["started"])], seconds
    except OSError:  # what keeps it from being read is said when it is written
        return [], 0.0
    except (ValueError, KeyError, TypeError, AttributeError):
        text = f"{file}: damaged; it is written anew, without the times of earlier starts"
        warnings.warn(text, UserNote, stacklevel=2)
        return [], 0.0


def _remove_unused(folder: Path) -> None:
    """Removes the folder of a run that failed before it had written anything of its own."""
    if {path.name for path in folder.iterdir()} <= {_LOCK, _CONFIG, _ENV, _FILES}:
        shutil.rmtree(folder, ignore_errors=True)


def command_line(task_name: str, *words: str) -> str:
    """The line that a shell takes to run a task with `words`."""
    return f"{program()} {shlex.join([task_name, *words])}"


def run_name(task_name: str, config: Any, name: str, inputs: dict[str, str]) -> str:
    """The folder name of a run: the config's name and a short hash of all that decides its results."""
    code = provenance.code()
    how = getattr(config, "HOW_IT_RUNS", ())
    what = {key: value for key, value in configs.to_dict(config).items() if key not in how}
    identity = [task_name, what, inputs, code.version, code.commit, code.changes]
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashed_name(name, text)


def safe_name(name: str) -> str:
    """`name` in letters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"


def hashed_name(name: str, identity: str) -> str:
    """A folder name: `safe_name(name)`, and a short hash of `identity`."""
    return f"{safe_name(name)}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


@contextmanager
def _locked(folder: Path) -> Iterator[str]:
    """Holds the lock of a run folder; it goes with the process, however that ends.

    Yields:
      What the lock's file holds: of this process alone.

    Raises:
      UserError: another process holds it, or it cannot be taken here.
    """
    path = folder / _LOCK
    with writing(path):
        file = open(path, "w")  # noqa: SIM115 (closed below)
    with file:
        try:
            with writing(path):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except UserError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise UserError(
                f"{folder}: another process is at work on this run; wait for it or use --outputs"
            ) from None
        token = uuid.uuid4().hex
        with writing(path):
            file.write(token)
            file.flush()
        yield token


def _clear(folder: Path) -> None:
    """Removes what a run wrote; of one that was killed, which has no list of it, all but what lay there when
    it began.

    Raises:
      UserError: the list is damaged, or something cannot be removed.
    """
    foreign = _foreign(folder)
    found = files_below(folder) - {_LOCK, _FILES}
    with writing(folder):
        (folder / _RESULTS).unlink(missing_ok=True)  # first: half cleared must not look done
        write_json(folder / _FILES, {"foreign": foreign})  # before the rest goes: who is killed here knows it
        for name in found - {_RESULTS, *foreign}:
            (folder / name).unlink()
        inner = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
        remove_empty(sorted(inner, reverse=True))
        if not foreign:
            (folder / _FILES).unlink()
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        warnings.warn(
            f"{folder}: kept what this run did not write: {', '.join(foreign[:3])}{more}",
            UserNote,
            stacklevel=2,
        )


def _listed(folder: Path) -> dict[str, list[str]]:
    """The list of a run's files; of a run that has none nothing.

    Raises:
      UserError: it is damaged.
    """
    file = folder / _FILES
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: [str(name) for name in found[key]] for key in ("written", "foreign") if key in found}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise UserError(f"{file}: damaged; remove the folder, or what of it is not yours") from None


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
