"""A task small enough to see through: it logs a falling loss, and stops or fails where it is told to."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxlab.app.runs import Run
from jaxlab.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 2
    """How deep."""
    names: tuple[str, ...] = ()
    """Words."""

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ConfigError(f"must not be negative, is {self.depth}", key="depth")


@dataclasses.dataclass(frozen=True)
class File:
    """Numbers of a file."""

    kind: Literal["file"] = "file"
    path: str = "numbers"
    """Which file."""


@dataclasses.dataclass(frozen=True)
class Random:
    """Numbers drawn anew.

    Nobody reads further.
    """

    kind: Literal["random"] = "random"
    seed: int = 0
    """Where they begin."""


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int
    """How many lines to log."""
    rate: float = 0.5
    """What the loss falls by."""
    note: str | None = None
    """Free text."""
    stop: str = ""
    """The way to end: not at all, killed, user error, error."""
    model: Inner = Inner()
    """A group."""
    source: File | Random = Random()
    """One group of two."""


calls: list[Config] = []
"""Configs that were run in this process, in order."""


def check(config: Config) -> dict[str, Any]:
    return {"steps": config.steps, "memory": {"device 0": "1 MiB"}}


def inputs(config: Config) -> dict[str, str]:
    return {"note": Path(config.note).read_text()} if config.note and Path(config.note).exists() else {}


def run(config: Config, run: Run) -> dict[str, Any]:
    calls.append(config)
    counter = run.path / "counter"
    start = int(counter.read_text()) if counter.exists() else 0
    if start:
        run.rewind(start)
    for step in range(start, config.steps):
        run.log(loss=config.rate**step)
        if config.stop and step == 1:
            counter.write_text("1")
            {"killed": _interrupt, "user": _user, "bug": _bug}[config.stop]()
    return {"loss": config.rate**config.steps, "started_at": start, "depth": config.model.depth}


def _interrupt() -> None:
    raise KeyboardInterrupt


def _user() -> None:
    raise UserError("the rate\nis wrong; lower it")


def _bug() -> None:
    raise ValueError("a bug")
