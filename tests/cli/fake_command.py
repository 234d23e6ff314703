"""A task that takes arguments."""

import dataclasses
from typing import Any

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: Positional[str]
    """A model."""
    others: Positional[tuple[str, ...]] = ()
    """More models."""
    prompt: str = "hello"
    """What to begin with."""
    loud: bool = False
    """Whether to shout."""


calls: list[Any] = []


def run(arguments: Arguments) -> None:
    calls.append(arguments)
