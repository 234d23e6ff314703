"""Entry points: each task is a module here with its config and `run`. Nothing below imports one."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab import config as configs
from jaxlab.app import Registry, RunResult, Task, command_line, run_command_line, run_config
from jaxlab.config import from_mapping
from jaxlab.errors import UserError

TASKS = Registry(
    [
        Task(
            "quickstart",
            "jaxlab.tasks.quickstart",
            "the main job: all three systems on real input, and a report",
            "arguments",
        ),
        Task("prepare", "jaxlab.tasks.prepare", "tokenise the data of a train config, once"),
        Task("train", "jaxlab.tasks.train", "train, fine-tune or retrofit a language model or a VLM"),
        Task(
            "evaluate",
            "jaxlab.tasks.evaluate",
            "measure a model: perplexity by position, needle, exact match, ...",
        ),
        Task("generate", "jaxlab.tasks.generate", "stream text from a model", "arguments"),
        Task("inspect", "jaxlab.tasks.inspect", "what models are, and which can be merged", "arguments"),
        Task(
            "convert",
            "jaxlab.tasks.convert",
            "write a model in another form: Hugging Face's, ours",
            "arguments",
        ),
        Task(
            "build-vlm",
            "jaxlab.tasks.build_vlm",
            "a VLM to train, from a language model and a vision tower",
            "arguments",
        ),
        Task(
            "merge",
            "jaxlab.tasks.merge",
            "merge checkpoints, or inject a skill into a VLM, by a recipe",
            "arguments",
        ),
        Task(
            "merge-search",
            "jaxlab.tasks.merge_search",
            "search over weights, densities and operators on the device",
        ),
        Task(
            "attention-speed",
            "jaxlab.tasks.attention_speed",
            "how long sparse and dense attention take, by length",
        ),
        Task("icl", "jaxlab.tasks.icl", "analyse in-context learning: flows, blocking, prompts"),
        Task("report", "jaxlab.tasks.report", "an HTML page from the results of runs", "arguments"),
    ]
)
"""What the command line offers, in the order of its help. docs/tasks.md tells how to add one."""


def main(words: Sequence[str] | None = None) -> int:
    """The command line: runs `words` (those of the process if None) and returns the exit status."""
    return run_command_line(words, TASKS)


def execute(
    task_name: str,
    config: str | os.PathLike[str] | Any,
    overrides: configs.Overrides = (),
    *,
    outputs: str | os.PathLike[str] = "outputs",
    overwrite: bool = False,
    name: str | None = None,
    callbacks: Sequence[Any] = (),
) -> RunResult:
    """Runs a config task, or returns the results of the same run if it is done: the road that the command
    line takes.

    Args:
      task_name: a task that takes a config.
      config: a YAML file, or an instance of the task's `Config`.
      overrides: words as on the command line, or values by dotted key.
      outputs: the folder that run folders go to.
      overwrite: whether to do a finished run anew.
      name: the config's part of the folder name; the file's name without suffix if not given.
      callbacks: for `train`, `jaxlab.training.Callback`s beside its own.

    Raises:
      UserError: the user's mistakes.
      Exception: whatever the task raises.
    """
    task = TASKS.find(task_name)
    if task.takes != "config":
        raise UserError(f"{task_name} takes no config")
    if callbacks and task_name != "train":
        raise UserError(f"{task_name} takes no callbacks")
    schema = task.schema()
    if isinstance(config, schema):
        resolved = configs.replace(config, overrides)
        return run_config(
            task, resolved, name or task_name, outputs=outputs, overwrite=overwrite, callbacks=callbacks
        )
    words = from_mapping(schema, overrides) if isinstance(overrides, Mapping) else overrides
    resolved = configs.load(schema, config, words)
    command = command_line(task_name, os.fspath(config), *words)
    return run_config(
        task,
        resolved,
        name or Path(config).stem,
        command,
        outputs=outputs,
        overwrite=overwrite,
        callbacks=callbacks,
    )
