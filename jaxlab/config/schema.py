"""What a config class can hold, and how its types are named to the user."""

import dataclasses
import difflib
import functools
import keyword
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union

from jaxlab.config import yaml_text

ABSENT: Any = object()
"""Stands for a default where there is none; None is a default."""

POSITIONAL: Any = object()
"""Marks a field that the command line gives without its name: `model: Annotated[str, POSITIONAL]`."""

REPEATED: Any = object()
"""Marks a list of str that the command line gives one by one, each word as it is: `--stop a --stop '[b]'`."""

OTHERS: Any = object()
"""Marks a dict that takes every key of its config that no other field has: `Annotated[dict[str, T], OTHERS]`.
Only files give them; `__post_init__` says which there may be."""

KIND = "kind"
"""The key that tells the configs of a union apart; each declares its own: `kind: Literal["nsa"] = "nsa"`."""

_SCALARS: tuple[type, ...] = (bool, int, float, str, types.NoneType)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config class: its key in YAML, its name in Python, its type and default."""

    key: str
    name: str
    type: Any
    default: Any
    positional: bool
    repeated: bool = False
    others: bool = False


@functools.cache
def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a config class by key.

    Raises:
      TypeError: a class or type that configs cannot hold.
    """
    if not is_config(cls) or not vars(cls)["__dataclass_params__"].frozen:
        raise TypeError(f"{cls} is not a frozen dataclass")
    hints = typing.get_type_hints(cls, include_extras=True)
    result = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        bare = field.name.removesuffix("_")
        key = bare if keyword.iskeyword(bare) else field.name
        hint, extras = hints[field.name], []
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
        _check_type(hint, f"{cls.__name__}.{field.name}")
        default = ABSENT
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        marks = (mark in extras for mark in (POSITIONAL, REPEATED, OTHERS))
        result[key] = Field(key, field.name, hint, default, *marks)
    return {KIND: result.pop(KIND), **result} if KIND in result else result


def others_of(cls: type) -> Field | None:
    """The field of a config class that takes the keys of none of its fields, if it has one."""
    return next((field for field in fields_of(cls).values() if field.others), None)


@functools.cache
def variants(kind: Any) -> dict[str, type]:
    """The configs with a `kind` that a value of a type may be, by the word of it."""
    words = {member: kind_of(member) for member in groups(kind)}
    return {word: member for member, word in words.items() if word is not None}


@functools.cache
def kind_of(cls: type) -> str | None:
    """The word that a config class declares as its `kind`, or None."""
    field = fields_of(cls).get(KIND)
    words = choices(field.type) if field else ()
    return words[0] if len(words) == 1 else None


@functools.cache
def inner_fields(kind: Any) -> dict[str, Field]:
    """What may stand below a key of a type, by key: a config's fields, or those of all configs of a union.

    Raises:
      TypeError: two configs of a union give one key different types.
    """
    result: dict[str, Field] = {}
    for group in groups(kind):
        for key, field in fields_of(group).items():
            known = result.setdefault(key, field)
            if known.type == field.type:
                continue
            words = dict.fromkeys([*choices(known.type), *choices(field.type)])
            if {typing.get_origin(known.type), typing.get_origin(field.type)} != {Literal}:
                raise TypeError(f"{group.__name__}.{key}: {field.type}, but {known.type} in other kinds")
            result[key] = dataclasses.replace(known, type=Literal[tuple(words)])
    return result


@functools.cache
def leaves(kind: Any, prefix: str = "") -> dict[str, Field]:
    """Every field that holds a value of its own, by dotted key; optional groups, and at the end theirs."""
    result, optional = {}, {}
    for key, field in inner_fields(kind).items():
        below = leaves(field.type, f"{prefix}{key}.")
        if not groups(field.type) or types.NoneType in members(field.type):
            result[prefix + key] = field
            optional.update(below)
        else:
            result.update(below)
    return result | optional


@functools.cache
def groups(kind: Any) -> tuple[type, ...]:
    """The config classes among the types of a union."""
    return tuple(member for member in members(kind) if is_config(member))


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
        words = {group: word for word, group in variants(kind).items()}
        return "|".join(words.get(member) or describe(member) for member in members(kind))
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
    if len(groups(kind)) > max(1, len(variants(kind))):
        raise TypeError(f"{name}: the configs of a union need a field `kind` each, with a word of its own")
    inner_fields(kind)
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
