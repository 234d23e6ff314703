"""What a task is, and a table of tasks by name. A task is a module; it is imported only when it is asked for.

A config task has `Config` (a frozen dataclass) and `run(config, run) -> dict`. It may have `check(config) ->
dict` for `--check`, with `check_table(report) -> str` for people, `inputs(config) -> dict[str, str]`, the
identities of the checkpoints it reads, `still_done(config) -> bool`, whether what a finished run has made
outside of its folder is still there, and `SHOWN`, the dotted keys of the results that the last line of a run
and the table of a sweep show. A command task has `Arguments` (a frozen dataclass) and `run(arguments) ->
None`. docs/tasks.md tells how to add one.
"""

import dataclasses
import functools
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, Literal

from jaxlab.config import suggestion
from jaxlab.errors import UserError


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

    def shown(self, results: dict[str, Any]) -> dict[str, Any]:
        """What people see first of the results, by dotted key; all of them where the task does not say."""
        module = self.load()
        if not hasattr(module, "SHOWN"):
            return results
        found = {key: functools.reduce(_inner, key.split("."), results) for key in module.SHOWN}
        return {key: value for key, value in found.items() if value is not None}


def _inner(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


class Registry:
    """Tasks by name, in the order in which the help lists them.

    Raises:
      ValueError: a name given twice.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._by_name: dict[str, Task] = {}
        for task in tasks:
            self.add(task)

    def add(self, task: Task) -> None:
        if task.name in self._by_name:
            raise ValueError(f"there are two tasks named {task.name}")
        self._by_name[task.name] = task

    def __iter__(self) -> Iterator[Task]:
        return iter(self._by_name.values())

    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> Task:
        """The task of a name.

        Raises:
          UserError: with the nearest name if there is none.
        """
        if name not in self._by_name:
            hint = suggestion(name, self._by_name) or f"; there are {', '.join(self._by_name)}"
            raise UserError(f"unknown task {name!r}{hint}")
        return self._by_name[name]
