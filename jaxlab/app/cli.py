"""The command line, `run.py TASK ...`: exit 0 done, 2 the user's mistake in one line, 1 anything else."""

import dataclasses
import errno
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlab import config as configs
from jaxlab import distributed
from jaxlab.app import interrupts, runs, sweeps
from jaxlab.app.compile_cache import use_compile_cache
from jaxlab.app.program import program
from jaxlab.app.registry import Registry, Task
from jaxlab.config import (
    dump_yaml,
    fields_of,
    from_mapping,
    is_option,
    leaves,
    resolve,
    suggestion,
    take_option,
)
from jaxlab.distributed import OneProcessConfig
from jaxlab.errors import COMMAND_LINE, ConfigError, UserError, UserNote
from jaxlab.files import NO_ROOM, output_path


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of every task that takes a config."""

    print_config: bool = False
    """print the resolved config, run nothing"""
    check: bool = False
    """make all checks and estimate the memory, load and run nothing"""
    overwrite: bool = False
    """do a finished run anew"""
    outputs: str = "outputs"
    """the folder that run folders go to"""
    sweep: tuple[str, ...] = ()
    """one run for each value of a list, for each combination of several lists"""
    sweep_mode: Literal["product", "zip"] = "product"
    """combine several lists, or walk through them side by side"""
    sweep_index: str | None = None
    """run these points of the sweep alone, numbers from 0 with commas, or auto: the task of a SLURM array"""
    sweep_jobs: int = 1
    """points of the sweep at once, each a process with its share of this host's GPUs"""
    sweep_collect: bool = False
    """the table of what the points of the sweep have given so far; run nothing"""
    sweep_script: bool = False
    """print a script for SLURM that runs the sweep as an array, run nothing"""
    print_commands: bool = False
    """print the command of every point of a sweep, run nothing"""


def run_command_line(words: Sequence[str] | None, tasks: Registry) -> int:
    """Runs the command line `words` (sys.argv without the program if None) and returns the exit status."""
    # Before a library sets it up: what is logged for the user is a line, without the logger's name.
    logging.basicConfig(format="%(message)s")
    warnings.formatwarning = _format_warning
    try:
        with interrupts.prompt():
            status = _main(list(sys.argv[1:] if words is None else words), tasks)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {_of_process()}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return interrupts.say(error)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        what = f"{error.filename}: " if error.filename else ""
        print(f"error: {_of_process()}{UserError(f'{what}{error.strerror}')}", file=sys.stderr)
        return 2
    return status


def _of_process() -> str:
    return "" if distributed.is_main() else f"process {distributed.process_index()}: "


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A note for the user as one line; other warnings with the place that they come from."""
    if issubclass(category, UserNote):
        return f"note: {UserError(str(message))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _main(words: list[str], tasks: Registry) -> int:
    """Does what the words say; returns the exit status where nothing is raised."""
    if words and words[0] in ("--help", "-h"):
        from jaxlab.app import help

        print(help.task_list(tasks))
        return 0
    if not words or is_option(words[0]):
        raise UserError(f"which task? {', '.join(tasks.names())}; {program()} --help tells more")
    task = tasks.find(words.pop(0))
    if "--help" in words or "-h" in words:
        from jaxlab.app import help

        help.print_task(task, RunOptions)
    elif task.takes == "arguments":
        use_compile_cache()
        task.load().run(configs.load(task.schema(), None, words))
    else:
        return _run_config_task(task, words)
    return 0


def _run_config_task(task: Task, words: list[str]) -> int:
    options, words = _take_options(words)
    if not words or is_option(words[0]):
        raise UserError(
            f"{task.name} takes a config first: {program()} {task.name} CONFIG.yaml [--field.sub value ...]"
        )
    path, *words = words
    schema = task.schema()
    clash = fields_of(schema).keys() & fields_of(RunOptions).keys()
    if clash:
        raise TypeError(f"{task.module}.Config has fields named as options of every task: {sorted(clash)}")
    _check_names(schema, words)
    _check_sweep(options)
    points = sweeps.points(schema, options.sweep, options.sweep_mode)
    # Every point is validated before the first one runs.
    loaded: list[Any] = [
        configs.load(schema, path, [*words, *from_mapping(schema, point)]) for point in points
    ]
    commands = [runs.command_line(task.name, path, *words, *from_mapping(schema, point)) for point in points]
    if options.print_config:
        print("---\n".join(map(configs.dump, loaded)), end="")
    elif options.print_commands:
        kept = ["--overwrite"] * options.overwrite + [f"--outputs={options.outputs}"] * (
            options.outputs != "outputs"
        )
        for command in commands:
            print(" ".join([command, *map(shlex.quote, kept)]))
    elif options.check:
        use_compile_cache()
        for config in loaded:
            module = task.load()
            report = module.check(config) if hasattr(module, "check") else {"config": "valid"}
            if hasattr(module, "check_table"):  # as comments: all of it is YAML
                print("".join(f"# {line}\n" for line in module.check_table(report).splitlines()), end="")
            print(dump_yaml(configs.to_plain(report)), end="")
    else:
        todo = [
            sweeps.Point(point, config, command)
            for point, config, command in zip(points, loaded, commands, strict=True)
        ]
        name = Path(path).stem
        outputs = output_path(options.outputs)
        use_compile_cache()
        if options.sweep:
            return _sweep(task, path, words, options, todo, outputs)
        result = runs.run_config(
            task, loaded[0], name, commands[0], outputs=outputs, overwrite=options.overwrite
        )
        print(sweeps.summary(task.shown(result.results)))
    return 0


def _sweep(
    task: Task, path: str, words: list[str], options: RunOptions, todo: Sequence[sweeps.Point], outputs: Path
) -> int:
    """Runs a sweep, or the part of it that is asked for; returns the exit status."""
    name = Path(path).stem
    again = [task.name, path, *words, "--sweep", *options.sweep, "--sweep-mode", options.sweep_mode]
    again += ["--outputs", options.outputs, *["--overwrite"] * options.overwrite]
    if options.sweep_collect:
        return 1 if sweeps.show(task, name, todo, outputs=outputs) else 0
    if options.sweep_script:
        command = f"{program()} {shlex.join(again)}"
        print(sweeps.array_script(task, name, len(todo), command, options.outputs), end="")
        return 0
    several = any(
        getattr(point.config, "distributed", None) not in (None, OneProcessConfig()) for point in todo
    )
    if options.sweep_index is not None:
        chosen = sweeps.index_of(options.sweep_index, len(todo), os.environ)
        if several and len(chosen) > 1:
            raise UserError("--sweep-index: processes that compute together take one point a job")
        found = [
            sweeps.run_point(task, name, todo, index, outputs=outputs, overwrite=options.overwrite)
            for index in chosen
        ]
        return next((status for status in (1, 2) if status in found), 0)
    if several:
        raise UserError(
            "--sweep: processes that compute together (distributed) take one point a job; give --sweep-index"
        )
    if options.sweep_jobs > 1:
        logs = sweeps.folder_of(task, name, todo, outputs) / "points"
        one = [sys.executable, sys.argv[0], *again]
        status = sweeps.run_at_once(todo, one, options.sweep_jobs, logs)
        sweeps.show(task, name, todo, outputs=outputs)
        return status
    return sweeps.run(task, name, todo, outputs=outputs, overwrite=options.overwrite)


def _take_options(words: list[str]) -> tuple[RunOptions, list[str]]:
    """The options of every task, and the words that are left for the task."""
    taken: list[tuple[tuple[str, ...], Any]] = []
    rest: list[str] = []
    queue = list(words)
    while queue:
        name = queue[0][2:].partition("=")[0].replace("-", "_")
        if is_option(queue[0]) and name in fields_of(RunOptions):
            taken.append(take_option(RunOptions, queue))
        else:
            rest.append(queue.pop(0))
    return configs.build(RunOptions, {keys[0]: value for keys, value in taken}, COMMAND_LINE), rest


def _check_sweep(options: RunOptions) -> None:
    """Whether the options of sweeps go together.

    Raises:
      ConfigError: they do not.
    """
    ways = {
        "sweep_index": options.sweep_index is not None,
        "sweep_jobs": options.sweep_jobs != 1,
        "sweep_collect": options.sweep_collect,
        "sweep_script": options.sweep_script,
    }
    asked = [name for name, given in ways.items() if given]
    if options.sweep_jobs < 1:
        raise ConfigError(f"must be at least 1, is {options.sweep_jobs}", "sweep_jobs", COMMAND_LINE)
    if asked and not options.sweep:
        raise ConfigError("is for a sweep; give --sweep", asked[0], COMMAND_LINE)
    if len(asked) > 1:
        raise ConfigError(f"one way at a time: {', '.join(asked)}", asked[1], COMMAND_LINE)


def _check_names(schema: type, words: list[str]) -> None:
    """Answers a misspelt option of every task, which the config's own fields cannot explain."""
    for word in filter(is_option, words):
        name = word[2:].partition("=")[0]
        try:
            resolve(schema, name)
        except ConfigError:
            hint = suggestion(name.replace("-", "_"), [*leaves(schema), *fields_of(RunOptions)])
            for option in fields_of(RunOptions):
                if hint == f"; did you mean {option}?":
                    raise ConfigError(
                        f"unknown option; did you mean --{option.replace('_', '-')}?", name, COMMAND_LINE
                    ) from None
            raise
