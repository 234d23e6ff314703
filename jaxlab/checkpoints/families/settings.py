"""A config.json read key by key: each key is read, ignored by a list, or refused.

What changes the function of a model and is not known must never pass in silence, so `Settings.done` refuses
every key that nobody asked for, unless it is inert (inert_keys.py), or the user says that it is.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxlab.checkpoints.families.inert_keys import NOT_APPLIED, is_inert
from jaxlab.errors import UserError

IGNORED_KEYS = "_jaxlab_ignored_keys"
"""The key under which a config.json that was written here names those that were ignored on request."""


CONVERT_FIRST = " (a task without this option takes what convert writes with it)"
"""After a hint at --ignore-keys or --ignore-tensors."""


@dataclasses.dataclass
class Reading:
    """One reading of a config.json: what it may leave out, and what it has to say."""

    ignore_keys: tuple[str, ...] = ()
    """Keys to leave out although nobody knows them: whole ("text_config.key") or their last part."""
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)
    """Which of them were met, and where."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Lines for the user about keys that are not applied."""

    def ignores(self, path: str) -> bool:
        """Whether a key that nobody read is one of `ignore_keys`."""
        for key in self.ignore_keys:
            if f".{path}".endswith(f".{key}") or f".{key}".endswith(f".{path}"):
                self.ignored[key] = path
                return True
        return False


_reading: ContextVar[Reading] = ContextVar("reading")


@contextmanager
def reading(ignore_keys: Iterable[str]) -> Iterator[Reading]:
    """Every `Settings` inside leaves `ignore_keys` out, and notes what it does not apply."""
    token = _reading.set(Reading(tuple(ignore_keys)))
    try:
        yield _reading.get()
    finally:
        _reading.reset(token)


class Settings:
    """One level of a config.json; errors name the key and, for an inner level, the keys that lead to it."""

    def __init__(
        self, config: Any, family: str, defaults: Mapping[str, Any] | None = None, within: str = ""
    ) -> None:
        if not isinstance(config, Mapping):
            raise UserError(f"config.json: {within.rstrip('.')} must be a group of keys, is {_shown(config)}")
        self.config = {**(defaults or {}), **config}
        self.given = frozenset(config)
        self.family = family
        self.within = within
        self.read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the key is there, with a value."""
        return self.config.get(key) is not None

    def value(self, key: str, default: Any = None) -> Any:
        """Whatever the key holds; `default` where it is absent or null."""
        self.read.add(key)
        found = self.config.get(key)
        return default if found is None else found

    def ignore(self, *keys: str) -> None:
        """Keys of this family that do not matter."""
        self.read |= set(keys)

    def wrong(self, key: str, expected: str) -> UserError:
        return UserError(
            f"config.json: {self.within}{key} must be {expected}, is {_shown(self.config.get(key))}"
        )

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 31) -> int:
        """A whole number.

        Raises:
          UserError: there is neither a value nor a default.
        """
        found = self.value(key, default)
        if type(found) is not int or not least <= found <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return found

    def maybe_whole(self, key: str, default: int | None = None) -> int | None:
        """A whole number or null; the default only where the key is absent."""
        self.read.add(key)
        return self.whole(key, default) if self.config.get(key, default) is not None else None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        found = self.value(key, default)
        if type(found) not in (int, float) or not math.isfinite(found) or found <= 0:
            raise self.wrong(key, "a positive number")
        return float(found)

    def maybe_number(self, key: str) -> float | None:
        self.read.add(key)
        return self.number(key) if key in self else None

    def flag(self, key: str, default: bool = False) -> bool:
        found = self.value(key, default)
        if type(found) is not bool:
            raise self.wrong(key, "true or false")
        return found

    def words(self, key: str) -> list[str] | None:
        found = self.value(key)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise self.wrong(key, "a list of words")
        return found

    def word(self, key: str, default: str) -> str:
        found = self.value(key, default)
        if not isinstance(found, str):
            raise self.wrong(key, "a word")
        return found

    def refuse(self, key: str, why: str) -> UserError:
        """An error about a value that is known and not supported."""
        shown = _shown(self.config.get(key))
        return UserError(f"config.json: {self.within}{key} {shown} is not supported: {why}")

    def note(self, line: str) -> None:
        """Something to tell the user about keys of this level."""
        (_reading.get(None) or Reading()).notes.append(f"config.json: {self.within}{line}")

    def done(self) -> None:
        """Whether every key was read.

        Raises:
          UserError: one that may matter was not.
        """
        now = _reading.get(None) or Reading()
        for key in sorted(self.given - self.read):
            value, path = self.config[key], f"{self.within}{key}"
            if is_inert(key, value) or now.ignores(path):
                continue
            if key not in NOT_APPLIED:
                raise UserError(
                    f"config.json: {path} {_shown(value)} is not known to the family {self.family}; if it "
                    f"does not change what the model computes, pass --ignore-keys {path}{CONVERT_FIRST}"
                )
            self.note(f"{key} is not applied: {NOT_APPLIED[key]}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
