"""The YAML dialect of every file here: YAML 1.2's scalars, nothing that surprises.

`1e-3` is a number and `no` is a word; only `true`/`True` and `false`/`False` are booleans; `null`, `~`,
`None` and nothing at all are null. Duplicate keys, anchors, tags and several documents are errors. What
`dump` writes, `parse` reads back exactly.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from jaxlab.errors import ConfigError

Keys = tuple[str | int, ...]
"""The keys and indices that lead to a value in a document."""

_NULL = re.compile(r"^(?:~|null|Null|NULL|None|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT = re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.inf)$|^\.nan$")
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}
_MAX_DEPTH = 40


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not used here", event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _RESOLVERS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, None)


def _represent_float(dumper: _Dumper, value: float) -> yaml.Node:
    text = ".nan" if math.isnan(value) else repr(value).replace("inf", ".inf")
    return dumper.represent_scalar(_TAG + "float", text)


def _represent_str(dumper: _Dumper, value: str) -> yaml.Node:
    # Double quotes keep every character on one line: no folding, no lost carriage return.
    return dumper.represent_scalar(_TAG + "str", value, style=None if value.isprintable() else '"')


def _represent_sequence(dumper: _Dumper, value: Any) -> yaml.Node:
    flat = not any(isinstance(item, dict | list | tuple) for item in value)
    return dumper.represent_sequence(_TAG + "seq", value, flow_style=flat or None)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(list, _represent_sequence)
_Dumper.add_representer(tuple, _represent_sequence)


def dump(value: Any) -> str:
    """`value` (dicts, lists, tuples and scalars) as a block of YAML; lists of scalars stay on their line."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=False
    )


def dump_line(value: Any) -> str:
    """`value` as YAML on one line, as it is written on the command line."""
    text = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=True
    )
    return text.strip()[1:-1]


def is_null(text: str) -> bool:
    """Whether a word is one of those that mean null; nothing at all is not a word."""
    return bool(text and _NULL.match(text))


def parse(text: str, where: str) -> tuple[Any, dict[Keys, int]]:
    """The value of a YAML document and the line of every key in it.

    Raises:
      ConfigError: with `where` and the line, for anything that is not this dialect.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "cannot be read"
        raise ConfigError(
            f"not YAML: {problem}", where=f"{where}:{mark.line + 1}" if mark else where
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=where) from None
    except RecursionError:
        raise ConfigError("not YAML: nested too deeply", where=where) from None
    except (ValueError, OverflowError) as error:  # PyYAML's scanner, on escapes such as "\UFFFFFFFF"
        raise ConfigError(f"not YAML: {error}", where=where) from None
    lines: dict[Keys, int] = {}
    return (None if node is None else _construct(node, (), lines, where)), lines


def _construct(node: yaml.Node, keys: Keys, lines: dict[Keys, int], where: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(keys, line)
    key = ".".join(map(str, keys))
    place = f"{where}:{line}"
    if len(keys) > _MAX_DEPTH:
        raise ConfigError("nested too deeply", where=place)
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return dict(_pairs(node, keys, lines, where))
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_construct(child, (*keys, index), lines, where) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node.tag.removeprefix(_TAG), node.value)
        except ValueError as error:
            raise ConfigError(str(error), key, place) from None
    raise ConfigError(f"the tag {node.tag} is not used here", key, place)


def _pairs(
    node: yaml.MappingNode, keys: Keys, lines: dict[Keys, int], where: str
) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        place = f"{where}:{line}"
        group = ".".join(map(str, keys))
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise ConfigError(
                f"a key must be a word, found {shown}; put it in quotes if it is one", group, place
            )
        key = key_node.value
        if key in seen:
            raise ConfigError(
                f"given twice, first in line {seen[key]}", ".".join(map(str, (*keys, key))), place
            )
        seen[key] = line
        lines[(*keys, key)] = line
        yield key, _construct(value_node, (*keys, key), lines, where)


def _scalar(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    pattern = _RESOLVERS.get(kind)
    if pattern is None:
        raise ValueError(f"the tag {kind} is not used here")
    if not pattern.match(text):
        raise ValueError(f"{text!r} is not of the type {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > 1000:
            raise ValueError("a number of more than 1000 digits")
        return int(text)
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in text:
        raise ValueError(f"{text} is too large for a float")
    return value
