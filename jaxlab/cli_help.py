"""The pages that `--help` prints: the list of tasks, and every field of one task as tyro renders it."""

import ast
import functools
import inspect
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

from jaxlab import tasks, yaml_text
from jaxlab.config import to_plain
from jaxlab.schema import ABSENT, Field, describe, fields_of, is_config


def task_list() -> str:
    """The page of `run.py --help`."""
    width = max(map(len, tasks.names()))
    lines = [f"  {name:<{width}}  {tasks.find(name).summary}" for name in tasks.names()]
    return "\n".join(
        [
            "usage: run.py TASK [CONFIG.yaml] [--field.sub value ...]",
            "",
            "tasks:",
            *lines,
            "",
            "`run.py TASK --help` shows every field of a task. Configs are in configs/, results go to outputs/.",
        ]
    )


def print_task(task: tasks.Task, run_options: type) -> None:
    """Prints the page of `run.py TASK --help`."""
    is_config = task.takes == "config"
    lines = [task.summary[0].upper() + task.summary[1:] + ".", ""]
    if is_config:
        lines += ["CONFIG is a YAML file; it comes first, and options override it.", ""]
    lines += [
        "Values are YAML: 3, 1e-3, true, null, word, '[1, 2]'. A list may also be given as words: --field 1 2.",
        "A true|false field given without a value is true. Both --a_b and --a-b are understood.",
    ]
    if is_config:
        docs = field_docs(run_options)
        lines += ["", "options of every config task:"]
        lines += [
            f"  --{field.key.replace('_', '-')}{_argument(field.type, field.key)}  {docs[field.name]}"
            for field in fields_of(run_options).values()
        ]
    prog = f"run.py {task.name}" + (" CONFIG.yaml" if is_config else "")
    tyro.cli(
        task.schema(),
        prog=prog,
        description="\n".join(lines),
        args=["--help"],
        use_underscores=True,
        registry=_registry(),
        config=(tyro.conf.FlagConversionOff,),
    )


def _argument(kind: Any, key: str) -> str:
    return "" if kind is bool else " key=[a,b] ..." if key == "sweep" else f" {describe(kind).upper()}"


@functools.cache
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
    named = Annotated[kind, tyro.conf.arg(name=key)]
    if not is_config(kind):
        named = Annotated[named, _value(kind)]
    return tyro.conf.Positional[named] if positional else named


def _value(kind: Any) -> PrimitiveConstructorSpec[Any]:
    """A value as one word; tyro only shows it here, command_words and config read it."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=describe(kind),
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [yaml_text.dump_line(to_plain(value))],
    )


def _default(parent: Any, field: Field) -> Any:
    default = getattr(parent, field.name, field.default)
    return MISSING_NONPROP if default is ABSENT else default


@functools.cache
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
        for field, text in zip(statements, statements[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs
