"""A task that takes arguments."""

import dataclasses
from typing import Annotated, Any

from jaxlab.config import POSITIONAL


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: Annotated[str, POSITIONAL]
    """A model."""
    others: Annotated[tuple[str, ...], POSITIONAL] = ()
    """More models."""
    prompt: str = "hello"
    """What to begin with."""
    loud: bool = False
    """Whether to shout."""


calls: list[Any] = []


def run(arguments: Arguments) -> None:
    calls.append(arguments)
