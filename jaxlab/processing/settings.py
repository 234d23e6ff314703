"""What a folder's JSON files say of its processor, with types and bounds checked as values are asked for."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError

MOST_BYTES = 4 << 20
"""Processor files are a few kilobytes; a larger one is something else."""

Size = Mapping[str, int]
"""Like {"height": 336, "width": 336}, {"shortest_edge": 336} or {"longest_edge": 1456}."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file.

    Raises:
      UserError: it cannot be read, or is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a config")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, is a {type(value).__name__}")
    return value


@dataclass(frozen=True)
class ProcessorSettings:
    """Values by name from several places, the first that has one wins; null counts as absent."""

    layers: tuple[tuple[str, Mapping[str, Any]], ...]
    """(place, values), the strongest first; the place is for messages."""

    def find(self, *keys: str) -> tuple[Any, str]:
        """The value of one thing, by whichever of its names, in the strongest place; and where it stands."""
        for place, values in self.layers:
            for key in keys:
                if values.get(key) is not None:
                    return values[key], f"{place}: {key}"
        return None, f"{self.layers[0][0]}: {keys[0]}"

    def flag(self, key: str, default: bool = False) -> bool:
        value, where = self.find(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, is {shown(value)}")
        return value

    def whole(self, *keys: str, least: int = 1, most: int = 1 << 30) -> int:
        """A whole number within bounds that has to be there."""
        value = self.maybe_whole(*keys, least=least, most=most)
        if value is None:
            places = ", ".join(dict.fromkeys(place for place, _ in self.layers))
            raise UserError(f"{places}: no {keys[0]}; the images cannot be laid out without it")
        return value

    def maybe_whole(self, *keys: str, least: int = 1, most: int = 1 << 30) -> int | None:
        value, where = self.find(*keys)
        return None if value is None else whole(value, where, least, most)

    def number(self, key: str) -> float:
        value, where = self.find(key)
        return number(value, where)

    def word(self, key: str, default: str) -> str:
        value, where = self.find(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise UserError(f"{where} must be a word, is {shown(value)}")
        return value

    def per_channel(self, key: str) -> tuple[float, float, float]:
        """Three numbers, for red, green and blue; one number stands for all three."""
        value, where = self.find(key)
        values = value if isinstance(value, list | tuple) else [value] * 3
        if len(values) != 3:
            raise UserError(f"{where} must be three numbers, is {shown(value)}")
        red, green, blue = (number(v, where) for v in values)
        return red, green, blue

    def size(self, key: str, square: bool) -> Size:
        """A size; a bare number is the side of a square if `square`, else the length of the shortest edge.

        Edges come from one place only: a folder's size replaces the default, it is not mixed with it.
        """
        value, where = self.find(key)
        if isinstance(value, int) and not isinstance(value, bool):
            value = {"height": value, "width": value} if square else {"shortest_edge": value}
        elif isinstance(value, list | tuple) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        if not isinstance(value, Mapping) or not value:
            raise UserError(f"{where} must be a size, is {shown(value)}")
        return {k: whole(v, f"{where}.{k}", 1, 1 << 30) for k, v in value.items() if v is not None}

    def rectangle(self, key: str) -> tuple[int, int]:
        """A size of given (height, width)."""
        size = self.size(key, square=True)
        if "height" not in size or "width" not in size:
            raise UserError(f"{self.find(key)[1]} needs height and width, is {shown(size)}")
        return size["height"], size["width"]

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        """A list of (height, width)."""
        value, where = self.find(key)
        if not isinstance(value, list | tuple) or not 0 < len(value) <= 4096:
            raise UserError(f"{where} must be a list of [height, width], is {shown(value)}")
        for pair in value:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise UserError(f"{where} must hold pairs [height, width], holds {shown(pair)}")
        return tuple((whole(h, where, 1, 1 << 20), whole(w, where, 1, 1 << 20)) for h, w in value)


def whole(value: Any, where: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{where} must be a whole number from {least} to {most}, is {shown(value)}")
    return value


def number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{where} must be a number, is {shown(value)}")
    return float(value)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
