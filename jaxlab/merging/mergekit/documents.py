"""The YAML of mergekit's files: version 1.1 as PyYAML reads it (`yes` is true, `1e-3` a word, anchors and
merge keys are followed), one document or several, with the line of every value.

Nothing in a file is run or made into an object, and a file that grows when its anchors are followed is
refused.
"""

import os
from typing import Any

import yaml

from jaxlab.errors import ConfigError, UserError
from jaxlab.files import LONGEST_CONFIG, read_bounded

Keys = tuple[str | int, ...]
_MAX_DEPTH, _MAX_NODES = 40, 200_000
_MAP, _SEQUENCE, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "merge"))


class Document:
    """One document of a file: plain values, and where they stand."""

    def __init__(self, where: str, value: Any, lines: dict[Keys, int], repeated: list[Keys]) -> None:
        self.where = where
        self.value = value
        self.repeated = repeated
        """Keys that stand twice in a mapping, of which the last one counts."""
        self._lines = lines

    def place(self, keys: Keys) -> str:
        """File and line of a value, or of what it would stand in."""
        while keys and keys not in self._lines:
            keys = keys[:-1]
        return f"{self.where}:{self._lines[keys]}" if keys in self._lines else self.where

    def error(self, keys: Keys, message: str) -> ConfigError:
        """What is wrong with a value."""
        return ConfigError(message, ".".join(map(str, keys)), self.place(keys))


def read_documents(text: str, where: str) -> list[Document]:
    """The documents of a file, without empty ones.

    Raises:
      ConfigError: it is not YAML, or holds tags, or is nested too deeply or too large.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            found = []
            while loader.check_node():
                node = loader.get_node()
                if node is not None:
                    found.append(_Reader(loader, where).document(node))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "cannot be read"
        place = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError(f"not YAML: {problem}", where=place) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=where) from None
    except RecursionError:
        raise ConfigError("not YAML: nested too deeply", where=where) from None
    except (ValueError, OverflowError) as error:  # PyYAML, on escapes such as "\UFFFFFFFF", numbers and dates
        raise ConfigError(f"not YAML: {error}", where=where) from None
    return [document for document in found if document.value is not None]


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, where: str) -> None:
        self.loader, self.where = loader, where
        self.lines: dict[Keys, int] = {}
        self.repeated: list[Keys] = []
        self.nodes = 0

    def document(self, node: yaml.Node) -> Document:
        return Document(self.where, self.value(node, ()), self.lines, self.repeated)

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        self.lines.setdefault(keys, node.start_mark.line + 1)
        place = f"{self.where}:{node.start_mark.line + 1}"
        self.nodes += 1
        if len(keys) > _MAX_DEPTH or self.nodes > _MAX_NODES:
            raise ConfigError("nested too deeply, or too large", where=place)
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            return [self.value(child, (*keys, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            value = self.loader.construct_object(node)
            if value is None or isinstance(value, bool | int | float | str):
                return value
            return node.value  # a date is a word
        raise ConfigError(f"the tag {node.tag} is not used here", ".".join(map(str, keys)), place)

    def mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        result: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError("a key must be a word", where=f"{self.where}:{line}")
            key = key_node.value
            if key_node.tag == _MERGE:
                found = self.value(value_node, keys)
                for one in reversed(found if isinstance(found, list) else [found]):
                    if not isinstance(one, dict):
                        raise ConfigError("<< takes mappings", where=f"{self.where}:{line}")
                    inherited |= one
                continue
            if key in result:
                self.repeated.append((*keys, key))
            self.lines[(*keys, key)] = line
            result[key] = self.value(value_node, (*keys, key))
        return inherited | result


def is_mergekit_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of mergekit's: YAML, of which no document says what kind of recipe it is."""
    try:
        text = read_bounded(path, LONGEST_CONFIG).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, UserError):  # whoever reads it as a recipe says so
        return False
    try:
        documents = read_documents(text, os.fspath(path))
    except ConfigError:
        return "merge_method" in text
    values = [document.value for document in documents]
    return bool(values) and all(isinstance(value, dict) and "kind" not in value for value in values)
