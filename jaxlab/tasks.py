"""The tasks that `run.py` knows, by name. A task is a module; it is imported only when it is asked for.

A config task has `Config` (a frozen dataclass) and `run(config, run) -> dict`, and may have `check(config) ->
dict` for `--check` and `inputs(config) -> dict[str, str]`, the identities of the checkpoints it reads. A
command task has `Arguments` (a frozen dataclass) and `run(arguments) -> None`. docs/tasks.md tells how to add
one.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Literal

from jaxlab.errors import UserError
from jaxlab.schema import suggestion


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its name on the command line, its module, its line in the help, and what it takes."""

    name: str
    module: str
    summary: str
    takes: Literal["config", "arguments"] = "config"

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def schema(self) -> type:
        """The dataclass that describes what the task takes."""
        return self.load().Config if self.takes == "config" else self.load().Arguments


_TASKS: dict[str, Task] = {}


def register(task: Task) -> None:
    """Adds a task. Raises ValueError if its name is taken."""
    if task.name in _TASKS:
        raise ValueError(f"there are two tasks named {task.name}")
    _TASKS[task.name] = task


def names() -> list[str]:
    return list(_TASKS)


def find(name: str) -> Task:
    """The task of a name. Raises UserError with the nearest name if there is none."""
    if name not in _TASKS:
        hint = suggestion(name, _TASKS) or f"; there are {', '.join(_TASKS)}"
        raise UserError(f"unknown task {name!r}{hint}")
    return _TASKS[name]


for _task in (
    Task(
        "quickstart",
        "jaxlab.quickstart",
        "the main job: all three systems on real input, and a report",
        "arguments",
    ),
    Task("train", "jaxlab.training.train", "train, fine-tune or retrofit a language model or a VLM"),
    Task(
        "evaluate",
        "jaxlab.evaluation.evaluate",
        "measure a model: perplexity by position, needle, exact match, ...",
    ),
    Task("generate", "jaxlab.evaluation.generate", "stream text from a model", "arguments"),
    Task("inspect", "jaxlab.checkpoints.inspection", "what models are, and which can be merged", "arguments"),
    Task(
        "convert",
        "jaxlab.checkpoints.convert",
        "write a model in another form: Hugging Face's, ours",
        "arguments",
    ),
    Task(
        "merge",
        "jaxlab.merging.merge",
        "merge checkpoints, or inject a skill into a VLM, by a recipe",
        "arguments",
    ),
    Task(
        "merge-search", "jaxlab.merging.search", "search over weights, densities and operators on the device"
    ),
    Task("icl", "jaxlab.icl.analyse", "analyse in-context learning: flows, blocking, prompts"),
    Task("report", "jaxlab.reporting.report", "an HTML page from the results of runs", "arguments"),
):
    register(_task)
