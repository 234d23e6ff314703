"""The one config system: frozen dataclasses, filled from a YAML file and from the command line.

A file and the command line are merged into one tree of plain values, and the tree passes one validation,
`build`. Every mistake is a ConfigError of one line that names the place (file and line, or the command line),
the key and the remedy.

A config is a frozen dataclass. Its fields hold int, float, bool, str, Literal, None, other configs,
`tuple[...]` and `dict[str, ...]` of these, and unions of them. A string under a field is its line of help. A
field whose key is a Python keyword carries a trailing underscore (`lambda_` is the key `lambda`).
`__post_init__` raises ConfigError for values that do not fit together.

Configs in a union are told apart by `kind`, which each declares: `kind: Literal["nsa"] = "nsa"`. A group that
names no kind has that of the field's default. A word alone, `attention: full`, is the group that names its
kind and nothing else. A key has one type in all kinds of a union.
"""

import dataclasses
import logging
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

from jaxlab.config import command_line as command_words
from jaxlab.config import yaml_text
from jaxlab.config.schema import (
    ABSENT,
    KIND,
    choices,
    describe,
    fields_of,
    groups,
    inner_fields,
    is_config,
    leaves,
    members,
    others_of,
    suggestion,
    variants,
)
from jaxlab.config.yaml_text import Keys
from jaxlab.errors import COMMAND_LINE, ConfigError
from jaxlab.files import LONGEST_CONFIG, read_bounded, shipped

_log = logging.getLogger(__name__)

Origins = dict[Keys, str]
"""Where values came from, by the keys that lead to them: `file:line`, or the command line."""

Overrides = Sequence[str] | Mapping[str, Any]
"""Words of a command line, `["--model.depth", "4"]`, or values by dotted key, `{"model.depth": 4}`."""


def load[T](cls: type[T], path: str | os.PathLike[str] | None, overrides: Overrides = ()) -> T:
    """The config in a YAML file with `overrides` on top.

    Args:
      cls: a config class.
      path: the file, or None for defaults and overrides alone.
      overrides: words of a command line, or values by dotted key.

    Raises:
      ConfigError: a mistake in it, with its place and the remedy.
    """
    source = Source.of_file(path) if path is not None else Source()
    source.override(cls, overrides)
    return source.build(cls)


def replace[T](config: T, overrides: Overrides) -> T:
    """A config like `config` with `overrides` on top.

    Raises:
      ConfigError: a mistake in it, with its place and the remedy.
    """
    source = Source(to_dict(config), {})
    source.override(type(config), overrides)
    return source.build(type(config))


def build[T](cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """The config of class `cls` that `tree`, nested mappings of plain values, describes; errors name `where`.

    Raises:
      ConfigError: unknown and missing keys, wrong types, and what `__post_init__` refuses.
    """
    return Source(tree, {(): where}).build(cls)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a config by key, as they stand in a file."""
    values = {key: to_plain(getattr(config, f.name)) for key, f in fields_of(config.__class__).items()}
    others = others_of(config.__class__)
    return values if others is None else values | values.pop(others.key)


def to_plain(value: Any) -> Any:
    """`value` with configs and mappings as dicts, and tuples as lists."""
    if is_config(type(value)):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def dump(config: Any) -> str:
    """The whole config as YAML; loading it gives an equal config."""
    return yaml_text.dump(to_dict(config))


class Source:
    """A tree of plain values on its way to a config, and where each value came from."""

    def __init__(self, tree: Mapping[str, Any] | None = None, origins: Origins | None = None) -> None:
        self.tree: dict[str, Any] = dict(tree or {})
        self.origins: Origins = {(): COMMAND_LINE} if origins is None else origins

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> "Source":
        """What a YAML file holds.

        Raises:
          ConfigError: that is not a mapping.
        """
        path = shipped(path)
        where = os.fspath(path)
        try:
            text = read_bounded(path, LONGEST_CONFIG).decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError("not a text file in UTF-8", where=where) from None
        except OSError as error:
            hint = suggestion(where, (str(sibling) for sibling in path.parent.glob("*.yaml")))
            raise ConfigError(f"cannot be read: {error.strerror}{hint}", where=where) from None
        value, lines = yaml_text.parse(text, where)
        if not isinstance(value, dict | None):
            raise ConfigError(f"expected lines of `key: value`, found {_shown(value)}", where=where)
        origins = {keys: f"{where}:{line}" for keys, line in lines.items()}
        return cls(value, {**origins, (): where})

    def override(self, cls: type, overrides: Overrides) -> None:
        """Puts values of the command line, or of a program, over those that are there.

        A group that is given another kind keeps the values that this kind takes too. Others are left out, and
        a line of the log says so if a file gave them.
        """
        if isinstance(overrides, Mapping):
            items = [(command_words.resolve(cls, dotted)[0], value) for dotted, value in overrides.items()]
        else:
            items = command_words.parse(cls, overrides)
        self.tree = _spelled_out(cls, self.tree)
        single = [item for keys, value in items for item in _one_by_one(_type_at(cls, keys), keys, value)]
        for keys, value in single:
            try:
                if keys[-1] == KIND:
                    self._leave_out(keys[:-1], variants(_type_at(cls, keys[:-1])), value)
                _put(self.tree, keys, value)
            except ConfigError as error:
                raise error.at(self._where(error.key)) from None
            self._forget(keys)
            self.origins[keys] = COMMAND_LINE

    def _leave_out(self, keys: Keys, kinds: Mapping[str, type], word: Any) -> None:
        """Takes from the group at `keys` what its kind has and the kind `word` has not."""
        group: Any = self.tree
        for key in keys:
            group = group.get(key) if isinstance(group, Mapping) else None
        old = group.get(KIND) if isinstance(group, dict) else None
        if not (isinstance(old, str) and isinstance(word, str) and {old, word} <= kinds.keys()):
            return
        alien = fields_of(kinds[old]).keys() - fields_of(kinds[word]).keys()
        # What the command line itself gives stays: validation refuses it, whatever the order of the words.
        lost = [key for key in group if key in alien and self.origins.get((*keys, key)) != COMMAND_LINE]
        given = [key for key in lost if (*keys, key) in self.origins]
        if given:
            place = self._where(_dotted((*keys, given[0])))
            text = "%s: %s: left out, the kind is %s now: %s"
            _log.warning(text, place, _dotted(keys), word, ", ".join(given))
        for key in lost:
            del group[key]
            self._forget((*keys, key))

    def _forget(self, keys: Keys) -> None:
        self.origins = {known: place for known, place in self.origins.items() if known[: len(keys)] != keys}

    def build[T](self, cls: type[T]) -> T:
        """The validated config.

        Raises:
          ConfigError: with the place of the value that it is about.
        """
        try:
            return typing.cast(T, _Builder(cls).config(cls, self.tree, (), ABSENT))
        except ConfigError as error:
            raise error.at(self._where(error.key)) from None

    def _where(self, key: str) -> str:
        places = {".".join(map(str, keys)): place for keys, place in self.origins.items()}
        while key and key not in places:
            key = key.rpartition(".")[0]
        return places.get(key, "")


def _type_at(kind: Any, keys: Keys) -> Any:
    """The type of the value at `keys`, or None where no class says it."""
    for key in keys:
        field = inner_fields(kind).get(str(key))
        kind = field.type if field else None
    return kind


def _spelled_out(kind: Any, value: Any) -> Any:
    """`value` with `{kind: word}` for each word that stands alone for a group, or under the key that the
    group's class names as ALONE."""
    if isinstance(value, str) and variants(kind) and str not in members(kind) and value not in choices(kind):
        return {KIND: value}
    if isinstance(value, str) and is_config(kind) and hasattr(kind, "ALONE"):
        return {kind.ALONE: value}
    if groups(kind) and isinstance(value, Mapping):
        return {key: _spelled_out(_type_at(kind, (key,)), item) for key, item in value.items()}
    return value


def _one_by_one(kind: Any, keys: Keys, value: Any) -> Iterator[tuple[Keys, Any]]:
    """A value for a group as values of the fields in it."""
    value = _spelled_out(kind, value)
    if groups(kind) and isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _one_by_one(_type_at(kind, (key,)), (*keys, key), item)
    else:
        yield keys, value


def _put(tree: dict[Any, Any], keys: Keys, value: Any) -> None:
    """Sets one value; groups on the way are made, and a whole group is merged into what is there."""
    *parents, last = keys
    for depth, key in enumerate(parents):
        inner = tree.get(key)
        if not isinstance(inner, Mapping | None):
            raise ConfigError(
                f"expected a group of values, found {_shown(inner)}", _dotted(keys[: depth + 1])
            )
        tree[key] = tree = dict(inner or {})
    if isinstance(value, Mapping) and isinstance(tree.get(last), Mapping):
        for key, item in value.items():
            _put(tree, (last, key), item)
    else:
        tree[last] = value


class _Builder:
    """Validation: turns plain values into instances of types, or says in one line why that cannot be."""

    def __init__(self, root: type) -> None:
        self.root = root

    def config(
        self, cls: type, tree: Any, keys: Keys, default: Any, kinds: Mapping[str, type] | None = None
    ) -> Any:
        """The config of class `cls`; `kinds` are those that it could have been, if it is one of several."""
        if tree is None:  # a group with all its lines commented out
            tree = {}
        if not isinstance(tree, Mapping):
            _wrong(cls, tree, keys)
        fields, others = fields_of(cls), others_of(cls)
        unknown = [key for key in tree if key not in fields or fields[key].others]
        values = {}
        if others is not None:
            (_, kind) = typing.get_args(others.type)
            values[others.name] = {key: self.convert(kind, tree[key], (*keys, key)) for key in unknown}
        elif unknown:
            key = str(unknown[0])
            raise ConfigError(self.unknown(key, cls, kinds or {}), _dotted((*keys, key)))
        for key, field in fields.items():
            if field.others:
                continue
            inherited = getattr(default, field.name) if isinstance(default, cls) else field.default
            if key in tree:
                values[field.name] = self.convert(field.type, tree[key], (*keys, key), inherited)
                if field.name == "seed":
                    _check_seed(values[field.name], (*keys, key))
            elif inherited is not ABSENT:
                values[field.name] = inherited
            elif is_config(field.type):  # its own fields may all have defaults, and say so if not
                values[field.name] = self.config(field.type, {}, (*keys, key), ABSENT)
            else:
                if field.positional:
                    raise ConfigError(f"{key.upper()} missing: name it, without a key (--help tells more)")
                raise ConfigError(f"missing; give it as {describe(field.type)}", _dotted((*keys, key)))
        try:
            return cls(**values)
        except ConfigError as error:
            raise error.inside(keys) from None

    def convert(self, kind: Any, value: Any, keys: Keys, default: Any = ABSENT) -> Any:
        """`value` as the type `kind`: lists become tuples, ints floats where needed, nothing else bends."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        value = _spelled_out(kind, value)
        if float in members(kind) and type(value) is float and not math.isfinite(value):
            raise ConfigError(f"must be a finite number, is {_shown(value)}", _dotted(keys))
        if value is None and variants(kind) and types.NoneType not in members(kind):
            value = {}
        if isinstance(value, Mapping) and variants(kind):
            return self.variant(kind, value, keys, default)
        if len(members(kind)) > 1:
            return self.union(kind, value, keys, default)
        if is_config(kind):
            return value if isinstance(value, kind) else self.config(kind, value, keys, default)
        if origin is Literal:
            for choice in arguments:
                if type(choice) is type(value) and choice == value:
                    return value
        elif origin is tuple:
            return self.sequence(kind, value, keys)
        elif origin is dict:
            if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
                return {key: self.convert(arguments[1], item, (*keys, key)) for key, item in value.items()}
        elif type(value) is kind:
            return value
        elif kind is float and type(value) is int and abs(value) < 1 << 1023:
            return float(value)
        _wrong(kind, value, keys)

    def sequence(self, kind: Any, value: Any, keys: Keys) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            _wrong(kind, value, keys)
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ConfigError(f"needs {len(kinds)} values, found {len(value)}", _dotted(keys))
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(self.convert(kind, item, (*keys, index)) for index, (kind, item) in pairs)

    def union(self, kind: Any, value: Any, keys: Keys, default: Any) -> Any:
        inner: ConfigError | None = None
        # An int is an int before it is a float, and null is null before it is an empty group.
        order = {types.NoneType: 0, float: 2}
        for member in sorted(members(kind), key=lambda member: order.get(member, 1)):
            try:
                return self.convert(member, value, keys, default)
            except ConfigError as error:
                # A mistake inside a list or a group tells more than "none of these types".
                if len(error.key) > max(len(_dotted(keys)), len(inner.key) if inner else 0):
                    inner = error
        if inner is not None:
            raise inner
        _wrong(kind, value, keys)

    def variant(self, kind: Any, tree: Mapping[str, Any], keys: Keys, default: Any) -> Any:
        """The config of a union that its key `kind` names; without that key it is of the default's kind."""
        kinds = variants(kind)
        one_of: Any = Literal[tuple(kinds)]
        word = tree.get(KIND, getattr(default, KIND) if type(default) in kinds.values() else ABSENT)
        if word is ABSENT:
            raise ConfigError(f"missing; give it as {describe(one_of)}", _dotted((*keys, KIND)))
        return self.config(kinds[self.convert(one_of, word, (*keys, KIND))], tree, keys, default, kinds)

    def unknown(self, key: str, cls: type, kinds: Mapping[str, type]) -> str:
        known = fields_of(cls)
        owners = [word for word, other in kinds.items() if key in fields_of(other)]
        if owners:
            return f"belongs to kind {' and '.join(owners)}, here is {known[KIND].default}"
        if key in kinds:
            return f"what is below it stands beside `kind: {key}` now, without a key of its own"
        moved: Mapping[str, str] = getattr(cls, "MOVED", {})
        if key in moved:
            return f"is written so now: {moved[key]}"
        group, _, last = key.rpartition(".")
        if group and key in leaves(self.root):
            return f"unknown key; write {last} below {group.replace('.', ' below ')}, indented"
        elsewhere = [dotted for dotted in leaves(self.root) if dotted.rpartition(".")[2] == key]
        hint = suggestion(key, known) or (f"; did you mean {elsewhere[0]}?" if elsewhere else "")
        return "unknown key" + (hint or f"; known here: {_abridged(known)}")


def _abridged(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")


def _wrong(kind: Any, value: Any, keys: Keys) -> NoReturn:
    hint = suggestion(value, map(str, choices(kind))) if isinstance(value, str) else ""
    if str in members(kind) and isinstance(value, int | float):
        hint = "; put it in quotes if it is a word"
    raise ConfigError(f"expected {describe(kind)}, found {_shown(value)}{hint}", _dotted(keys))


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value) if dataclasses.is_dataclass(value) else yaml_text.dump_line(to_plain(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _check_seed(seed: Any, keys: Keys) -> None:
    """What every generator of random numbers here takes: jax.random keeps 32 bits of a larger one."""
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ConfigError(f"must be from 0 to {2**32 - 1}, is {seed}", _dotted(keys))
