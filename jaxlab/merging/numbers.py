"""A parameter as a merge file writes it, and what it is for one tensor.

It is written as one value; as a list of values, a gradient over layers; or as a list of {filter, value} or
{pattern, value}, of which the first that fits the tensor's name decides, each value being one of the former.

The rules are mergekit's, so that files of both kinds mean the same: a gradient is stretched over the layers
and interpolated linearly, its first value is that of tensors outside of layers, and values of it that are
switches or words are picked, not interpolated.
"""

import fnmatch
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from jaxlab.errors import ConfigError

Scalar = bool | int | float | str
"""A word is a number where it is one: YAML 1.1 reads 1e-3 as a word."""
Kind = Literal["number", "count", "switch"]
"""What a parameter is: a real number, a whole one, true or false."""

_WORDS = {"1": True, "on": True, "t": True, "true": True, "y": True, "yes": True}
_WORDS |= {"0": False, "off": False, "f": False, "false": False, "n": False, "no": False}
_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?(\d+(_\d+)*)?|\.\d+(_\d+)*)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Rule:
    """A value, or a gradient, for the tensors whose names it fits."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None
    """A part of the name. None and "*": every name."""
    pattern: str | None = None
    """The whole name, with * and ?."""

    def fits(self, name: str) -> bool:
        """Whether it is about the tensor of this name."""
        if self.pattern is not None and not fnmatch.fnmatchcase(name, self.pattern):
            return False
        return self.filter is None or self.filter == "*" or self.filter in name


@dataclass(frozen=True)
class Setting:
    """A parameter as it is written. The first rule that fits decides."""

    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, value: Any) -> "Setting":
        """The setting that a merge file writes so.

        Raises:
          ConfigError: it is none; `key` leads to what is wrong.
        """
        if isinstance(value, Mapping):
            return cls((_rule(value),))
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping | Rule) for item in value):
            found = []
            for i, item in enumerate(value):
                try:
                    found.append(_rule(item))
                except ConfigError as error:
                    raise error.inside((i,)) from None
            return cls(tuple(found))
        return cls((Rule(_scalar_or_gradient(value)),))

    def at(self, name: str, depth: float | Fraction = 0.0, kind: Kind = "number") -> Any:
        """The value for one tensor: a float, an int or a bool; None: no rule fits, or a gradient is empty.

        Args:
          depth: of its layer among those that a gradient is stretched over: 0 the first, 1 the last; 0
            outside of layers.

        Raises:
          ConfigError: a value that is not of this kind.
        """
        for rule in self.rules:
            if rule.fits(name):
                if not isinstance(rule.value, tuple):
                    return as_kind(rule.value, kind)
                return interpolate([as_kind(value, kind) for value in rule.value], depth, kind)
        return None

    def conditions(self) -> Iterator[str]:
        """All filters and patterns that can fail to fit."""
        for rule in self.rules:
            yield from (word for word in (rule.filter, rule.pattern) if word not in (None, "*"))

    def check(self, kind: Kind) -> None:
        """Whether every value is of this kind.

        Raises:
          ConfigError: one is not.
        """
        for rule in self.rules:
            for value in rule.value if isinstance(rule.value, tuple) else (rule.value,):
                as_kind(value, kind)


def interpolate(values: list[Any], depth: float | Fraction, kind: Kind = "number") -> Any:
    """A gradient at a depth between 0 and 1; None if it is empty.

    Raises:
      ConfigError: a whole number is asked for and lies between two.
    """
    if not values:
        return None
    scaled = depth * (len(values) - 1)
    first = int(scaled)
    if kind == "switch":
        return values[first]
    part = float(scaled - first)
    found = (1 - part) * values[first] + part * values[min(first + 1, len(values) - 1)]
    return as_kind(found, kind)


def as_kind(value: Any, kind: Kind) -> Any:
    """A written value as a float, an int or a bool.

    Raises:
      ConfigError: it is none.
    """
    wanted = {"number": "a number", "count": "a whole number", "switch": "true or false"}[kind]
    problem = ConfigError(f"must be {wanted}, is {shown(value)}")
    if kind == "switch":
        if isinstance(value, str) and value.lower() in _WORDS:
            return _WORDS[value.lower()]
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise problem
        return bool(value)
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise problem
        value = float(value)
    if not isinstance(value, bool | int | float):
        raise problem
    try:
        number = float(value)
    except OverflowError:
        raise problem from None
    if not math.isfinite(number):
        raise problem
    if kind == "number":
        return number
    if number != number // 1:
        raise problem
    return int(number)


def _rule(value: Any) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"is {shown(value)}, beside {{filter, value}}; a list is of one kind")
    for key in value:
        if key not in ("filter", "pattern", "value"):
            raise ConfigError("no such key; there are filter (or pattern) and value", key=str(key))
    if "value" not in value:
        raise ConfigError("missing", key="value")
    for key in ("filter", "pattern"):
        if not isinstance(value.get(key), str | None):
            raise ConfigError(f"must be a part of tensors' names, is {shown(value[key])}", key=key)
    try:
        return Rule(_scalar_or_gradient(value["value"]), value.get("filter"), value.get("pattern"))
    except ConfigError as error:
        raise error.inside(("value",)) from None


def _scalar_or_gradient(value: Any) -> Scalar | tuple[Scalar, ...]:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, bool | int | float | str) for item in value):
        return tuple(value)
    raise ConfigError(
        "must be a value, a list of values (over layers) or a list of {filter, value}, is " + shown(value)
    )


def shown(value: Any) -> str:
    """A value as an error names it."""
    try:
        return "nothing" if value is None else reprlib.repr(value)
    except ValueError:  # Python writes no whole numbers of thousands of digits
        return "a number of too many digits"
