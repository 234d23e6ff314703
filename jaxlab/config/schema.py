"""What a config class can hold, and how its types are named to the user."""

import dataclasses
import difflib
import keyword
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union

import tyro

from jaxlab.config import yaml_text

ABSENT: Any = object()
"""Stands for a default where there is none; None is a default."""

POSITIONAL: tuple[Any, ...] = typing.get_args(tyro.conf.Positional[int])[1:]
"""What `tyro.conf.Positional[...]` adds to the type of a field that is given without its name."""

_SCALARS: tuple[type, ...] = (bool, int, float, str, types.NoneType)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config class: its key in YAML, its name in Python, its type and default."""

    key: str
    name: str
    type: Any
    default: Any
    positional: bool


def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a config class by key.

    Raises:
      TypeError: a class or type that configs cannot hold.
    """
    if cls not in _FIELDS:
        _FIELDS[cls] = _read_fields(cls)
    return _FIELDS[cls]


_FIELDS: dict[type, dict[str, Field]] = {}


def _read_fields(cls: type) -> dict[str, Field]:
    if not is_config(cls) or not vars(cls)["__dataclass_params__"].frozen:
        raise TypeError(f"{cls} is not a frozen dataclass")
    hints = typing.get_type_hints(cls, include_extras=True)
    result = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        bare = field.name.removesuffix("_")
        key = bare if keyword.iskeyword(bare) else field.name
        hint, positional = hints[field.name], False
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
            positional = any(extra in POSITIONAL for extra in extras)
        _check_type(hint, f"{cls.__name__}.{field.name}")
        default = ABSENT
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        result[key] = Field(key, field.name, hint, default, positional)
    return result


def leaves(cls: type, prefix: str = "") -> dict[str, Field]:
    """Every field that holds a value of its own, by dotted key."""
    result = {}
    for key, field in fields_of(cls).items():
        if is_config(field.type):
            result.update(leaves(field.type, f"{prefix}{key}."))
        else:
            result[prefix + key] = field
    return result


def is_config(kind: Any) -> bool:
    """Whether a type is a config class, a group of fields."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_list(kind: Any) -> bool:
    """Whether only lists are values of a type."""
    return typing.get_origin(kind) is tuple


def choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, also inside a union."""
    return tuple(
        choice
        for member in members(kind)
        if typing.get_origin(member) is Literal
        for choice in typing.get_args(member)
    )


def describe(kind: Any) -> str:
    """A type in words short enough for a message and for the help: `int`, `full|nsa`, `[float, ...]`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if len(members(kind)) > 1:
        return "|".join(describe(member) for member in members(kind))
    if kind is types.NoneType:
        return "null"
    if kind is bool:
        return "true|false"
    if origin is Literal:
        return "|".join(yaml_text.dump_line(choice) for choice in arguments)
    if origin is tuple:
        return "[" + ", ".join("..." if item is Ellipsis else describe(item) for item in arguments) + "]"
    if origin is dict:
        return "{name: " + describe(arguments[1]) + ", ...}"
    if is_config(kind):
        return "{" + ", ".join(fields_of(kind)) + "}"
    return str(kind.__name__)


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?` with the candidate nearest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _check_type(kind: Any, name: str) -> None:
    for member in members(kind):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is tuple and arguments:
            for argument in arguments:
                if argument is not Ellipsis:
                    _check_type(argument, name)
        elif origin is dict and arguments[0] is str:
            _check_type(arguments[1], name)
        elif origin is not Literal and member not in _SCALARS and not is_config(member):
            raise TypeError(f"{name}: configs cannot hold the type {member}")
