"""Words of a command line as plain values by key: `--model.num_layers 4`, `--betas 0.9 0.99`, `--remat`.

- `--a.b VALUE` and `--a.b=VALUE` set one field; `-` and `_` are one in a key.
- A value is YAML on one line. Where only a str is wanted it is the text itself; where a str is one of several
  types, text that is nothing else is itself, and quotes make a word of `'1'` or `'null'`.
- The kind of a group that is one of several is set by `--a.kind word`, or by `--a word`.
- A list is one YAML list or several words. A true|false field given without a value is true.
- Options that may be repeated take one word each time, as it is, and are a list together.
- Words before the options, and those that no option takes, fill the positional fields in order.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlab.config import yaml_text
from jaxlab.config.schema import (
    choices,
    describe,
    fields_of,
    inner_fields,
    is_config,
    is_list,
    leaves,
    members,
    suggestion,
)
from jaxlab.errors import COMMAND_LINE, ConfigError

Path = tuple[str, ...]


def is_option(word: str) -> bool:
    """Whether a word names an option; `-1`, `-` and `--` are values."""
    return word.startswith("--") and len(word) > 2


def parse(cls: type, words: Sequence[str]) -> list[tuple[Path, Any]]:
    """The keys and plain values that `words` give to fields of `cls`, in their order.

    Raises:
      ConfigError: a mistake in it, with its place and the remedy.
    """
    result: list[tuple[Path, Any]] = []
    positionals = []
    repeated: dict[Path, list[str]] = {}
    queue = list(words)
    while queue:
        if is_option(queue[0]):
            path, values = take_option(cls, queue)
            if _is_repeated(cls, path):
                if path not in repeated:
                    result.append((path, repeated.setdefault(path, [])))
                repeated[path].extend(values)
            else:
                result.append((path, values))
        else:
            positionals.append(queue.pop(0))
    for field in fields_of(cls).values():
        if field.positional and positionals:
            count = len(positionals) if is_list(field.type) else 1
            result.append(((field.key,), from_words(field.type, positionals[:count])))
            positionals = positionals[count:]
    if positionals:
        raise ConfigError(f"{positionals[0]!r} is not expected; options begin with --", where=COMMAND_LINE)
    return result


def take_option(cls: type, queue: list[str]) -> tuple[Path, Any]:
    """Takes the option at the head of `queue` with the words of its value; returns its key and value."""
    dotted, equals, text = queue.pop(0)[2:].partition("=")
    path, kind = resolve(cls, dotted)
    following = next((index for index, word in enumerate(queue) if is_option(word)), len(queue))
    if _is_repeated(cls, path):
        if not equals and not following:
            raise ConfigError("needs a value", dotted, COMMAND_LINE)
        return path, [text if equals else queue.pop(0)]
    if equals:
        values = [text]
    elif is_list(kind):
        values = queue[:following]
        del queue[:following]
    elif kind is bool and not (following and queue[0].lower() in ("true", "false")):
        values = ["true"]
    elif following:
        values = [queue.pop(0)]
    else:
        raise ConfigError(f"needs a value: {describe(kind)}", dotted, COMMAND_LINE)
    return path, from_words(kind, values)


def _is_repeated(cls: type, path: Path) -> bool:
    return len(path) == 1 and fields_of(cls)[path[0]].repeated


def resolve(cls: type, dotted: str) -> tuple[Path, Any]:
    """The path and the type of a dotted key.

    Raises:
      ConfigError: with the nearest key if there is none.
    """
    kind: Any = cls
    path: Path = ()
    parts = dotted.split(".")
    for index, part in enumerate(parts):
        mapping = next((member for member in members(kind) if typing.get_origin(member) is dict), None)
        if mapping is not None:  # its keys are free, and may hold dots
            value = typing.get_args(mapping)[1]
            if parts[index + 1 :] and parts[index + 1].replace("-", "_") in inner_fields(value):
                path, kind = (*path, part), value  # a field of the group under this key
                continue
            return (*path, ".".join(parts[index:])), value
        key, fields = part.replace("-", "_"), inner_fields(kind)
        if key not in fields:
            raise ConfigError(f"unknown option{_hint(cls, dotted)}", dotted, COMMAND_LINE)
        path, kind = (*path, key), fields[key].type
    return path, kind


def _hint(cls: type, dotted: str) -> str:
    wanted = dotted.replace("-", "_")
    known = leaves(cls)
    same_end = [key for key in known if key.rpartition(".")[2] == wanted.rpartition(".")[2]]
    hint = f"; did you mean {same_end[0]}?" if same_end else suggestion(wanted, known)
    return hint.replace("did you mean ", "did you mean --") or "; --help lists the options"


def from_words(kind: Any, words: Sequence[str]) -> Any:
    """The plain value that the words of one option stand for, where a value of type `kind` is wanted."""
    if not is_list(kind):
        return _from_word(kind, words[0])
    if len(words) == 1:
        value = _from_word(kind, words[0])
        if isinstance(value, list):
            return value
    kinds = typing.get_args(kind)
    if ... in kinds or len(kinds) != len(words):  # validation will say how many are needed
        kinds = kinds[:1] * len(words)
    return [_from_word(item, word) for item, word in zip(kinds, words, strict=True)]


def _from_word(kind: Any, word: str) -> Any:
    if kind is str or word in choices(kind):
        return word
    try:
        value = yaml_text.parse(word, "")[0]
    except ConfigError:
        return word  # validation will say what was expected instead
    if str not in members(kind):
        return value
    if value is None:
        return None if yaml_text.is_null(word) and types.NoneType in members(kind) else word
    if isinstance(value, str):
        return value if word[0] in "'\"" else word
    return value if any(_is_value(member, value) for member in members(kind)) else word


def _is_value(kind: Any, value: Any) -> bool:
    """Whether a plain value has the outer form of a type, where the alternative is to read it as a str."""
    if is_config(kind) or typing.get_origin(kind) is dict:
        return isinstance(value, dict)
    if is_list(kind):
        return isinstance(value, list)
    return value in choices(kind) or type(value) is kind or (kind is float and type(value) is int)


def from_mapping(cls: type, values: Mapping[str, Any]) -> list[str]:
    """The words that set plain values by dotted key.

    Raises:
      ConfigError: a value that has no such word.
    """
    words = []
    for dotted, value in values.items():
        kind, line = resolve(cls, dotted)[1], yaml_text.dump_line(value)
        # Read back as the same value, type by type: 1, 1.0 and true are equal in Python.
        fitting = [word for word in (value, line) if isinstance(word, str) and _line(kind, word) == line]
        if not fitting:
            raise ConfigError(f"expected {describe(kind)}, found {line}", dotted, COMMAND_LINE)
        words.append(f"--{dotted}={fitting[0]}")
    return words


def _line(kind: Any, word: str) -> str:
    return yaml_text.dump_line(from_words(kind, [word]))
