"""The pages that `--help` prints: the list of tasks, and every field of one task."""

import ast
import inspect
import itertools
import shutil
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal

from jaxlab.app.program import program
from jaxlab.app.registry import Registry, Task
from jaxlab.config import (
    ABSENT,
    KIND,
    Field,
    describe,
    fields_of,
    groups,
    is_list,
    kind_of,
    members,
    to_plain,
    variants,
    yaml_line,
)


def task_list(tasks: Registry) -> str:
    """The page of `--help`."""
    width = max(map(len, tasks.names()))
    lines = [f"  {task.name:<{width}}  {task.summary}" for task in tasks]
    return "\n".join(
        [
            f"usage: {program()} TASK [CONFIG.yaml] [--field.sub value ...]",
            "",
            "tasks:",
            *lines,
            "",
            f"`{program()} TASK --help` shows the fields of a task. "
            "Configs are in configs/, runs in outputs/.",
            "Compiled programs are kept in ~/.cache/jaxlab/compiled; JAX_COMPILATION_CACHE_DIR=DIR sets "
            "another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.",
        ]
    )


def print_task(task: Task, run_options: type) -> None:
    """Prints the page of `TASK --help`."""
    takes_config = task.takes == "config"
    usage = f"usage: {program()} {task.name}{' CONFIG.yaml' * takes_config}"
    for field in fields_of(task.schema()).values():
        if field.positional:
            word = _positional(field)
            usage += f" {word}" if field.default is ABSENT else f" [{word}]"
    lines = [f"{usage} [--field.sub VALUE ...]", "", task.summary[0].upper() + task.summary[1:] + ".", ""]
    if takes_config:
        lines += ["CONFIG is a YAML file; it comes first, and options override it.", ""]
    lines += [
        "Values are YAML: 3, 1e-3, true, null, word, '[1, 2]'. A list may also be words: --field 1 2.",
        "A true|false field given without a value is true. Both --a_b and --a-b are understood.",
    ]
    if takes_config:
        lines += ["", "options of every task that takes a config:", *_option_lines(run_options)]
    lines += ["", "fields:", *_field_lines(task.schema(), "", ABSENT)]
    print("\n".join(lines))


def _option_lines(run_options: type) -> list[str]:
    values = {"outputs": " DIR", "sweep": " KEY=[A,B] ...", "sweep_mode": " product|zip"}
    values |= {"sweep_index": " I|auto", "sweep_jobs": " N"}
    docs = field_docs(run_options)
    options = {name: f"--{name.replace('_', '-')}{values.get(name, '')}" for name in fields_of(run_options)}
    width = max(map(len, options.values()))
    return [f"  {option:<{width}}  {docs[name]}" for name, option in options.items()]


def _field_lines(cls: type, prefix: str, default: Any) -> Iterator[str]:
    """Every field of a config class with what it is, then the groups in it, each under its heading."""
    docs = field_docs(cls)
    inner = []
    for field in fields_of(cls).values():
        value = getattr(default, field.name, field.default)
        if groups(field.type):
            inner.append((field, value))
            if types.NoneType not in members(field.type):
                continue
        elif field.key == KIND and prefix and kind_of(cls):  # the heading shows it, with the other kinds
            continue
        words = "TEXT, may be repeated" if field.repeated else describe(field.type)
        name = _positional(field) if field.positional else f"--{prefix}{field.key} {words}"
        yield f"  {name}"
        yield from _wrapped(f"{docs.get(field.name, '')} ({_default(value)})", 6)
    for field, value in inner:
        path, kinds = f"{prefix}{field.key}", variants(field.type)
        yield ""
        yield from _wrapped(f"{path}: {docs.get(field.name, '')}", 0)
        if kinds:
            yield f"  --{path}.{KIND} {describe(Literal[tuple(kinds)])}  ({_default(value)})"
        for group in groups(field.type):
            word = next((word for word, kind in kinds.items() if kind is group), None)
            if word is not None:
                yield ""
                summary = (inspect.getdoc(group) or "").partition("\n\n")[0]
                yield from _wrapped(f"{path}, kind {word}: {summary}", 2)
            yield from _field_lines(group, f"{path}.", value if type(value) is group else ABSENT)


def _positional(field: Field) -> str:
    return field.key.upper() + " ..." * is_list(field.type)


def _default(value: Any) -> str:
    if value is ABSENT:
        return "required"
    return f"default: {yaml_line(getattr(value, KIND, to_plain(value)))}"


def _wrapped(text: str, indent: int) -> list[str]:
    width = max(40, min(shutil.get_terminal_size().columns, 110))
    space = " " * indent
    return textwrap.wrap(" ".join(text.split()), width, initial_indent=space, subsequent_indent=space)


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, by field name; base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class made at run time has no source
            continue
        body = ast.parse(source).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(statements):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs
