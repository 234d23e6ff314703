"""The pages that `--help` prints: the list of tasks, and every field of one task as tyro renders it."""

import ast
import inspect
import itertools
import textwrap
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from jaxlab.app.program import program
from jaxlab.app.registry import Registry, Task
from jaxlab.config import to_plain, yaml_text
from jaxlab.config.schema import ABSENT, POSITIONAL, Field, describe, fields_of, is_config, is_list


def task_list(tasks: Registry) -> str:
    """The page of `run.py --help`."""
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
        ]
    )


def print_task(task: Task, run_options: type) -> None:
    """Prints the page of `run.py TASK --help`."""
    is_config = task.takes == "config"
    lines = [task.summary[0].upper() + task.summary[1:] + ".", ""]
    if is_config:
        lines += ["CONFIG is a YAML file; it comes first, and options override it.", ""]
    lines += [
        "Values are YAML: 3, 1e-3, true, null, word, '[1, 2]'. A list may also be words: --field 1 2.",
        "A true|false field given without a value is true. Both --a_b and --a-b are understood.",
    ]
    if is_config:
        lines += ["", "options of every task that takes a config:", *_option_lines(run_options)]
    prog = f"{program()} {task.name}" + (" CONFIG.yaml" if is_config else "")
    try:
        tyro.cli(
            task.schema(),
            prog=prog,
            description="\n".join(lines),
            args=["--help"],
            use_underscores=True,
            registry=_registry(),
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as exit_:
        if exit_.code:
            raise


def _option_lines(run_options: type) -> list[str]:
    values = {"outputs": " DIR", "sweep": " KEY=[A,B] ...", "sweep_mode": " product|zip"}
    docs = field_docs(run_options)
    options = {name: f"--{name.replace('_', '-')}{values.get(name, '')}" for name in fields_of(run_options)}
    width = max(map(len, options.values()))
    return [f"  {option:<{width}}  {docs[name]}" for name, option in options.items()]


def _registry() -> ConstructorRegistry:
    """How tyro is to show configs: our keys, our words for types, our way of writing values."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def _config(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not is_config(info.type):
            return None
        docs = field_docs(info.type)
        return StructConstructorSpec(
            instantiate=info.type,
            fields=tuple(
                StructFieldSpec(
                    name=field.name,
                    type=_annotated(field.type, field.key, field.positional),
                    default=_default(info.default, field),
                    helptext=docs.get(field.name),
                )
                for field in fields_of(info.type).values()
            ),
        )

    return registry


def _annotated(kind: Any, key: str, positional: bool) -> Any:
    # Positional[...] itself would be an expression of types, and these are known only now.
    extras: list[Any] = [tyro.conf.arg(name=key), *(POSITIONAL if positional else ())]
    if not is_config(kind):
        metavar = key.upper() + " ..." * is_list(kind) if positional else describe(kind)
        extras.append(_value(metavar))
    return Annotated[(kind, *extras)]


def _value(metavar: str) -> PrimitiveConstructorSpec[Any]:
    """A value as one word; tyro only shows it here, command_words and config read it."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [yaml_text.dump_line(to_plain(value))],
    )


def _default(parent: Any, field: Field) -> Any:
    default = getattr(parent, field.name, field.default)
    return MISSING_NONPROP if default is ABSENT else default


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
