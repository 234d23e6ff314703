"""The table of implementations: what each of them has, what it takes, and which one a call gets.

A new one is a folder like `xla/` or `mosaic_gpu/` with `Operators` in it, a name in `Implementation` and an
entry in `IMPLEMENTATIONS`. Only the one that a call gets is imported.
"""

import contextlib
import contextvars
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Literal

from kernels_pallas.nsa import records
from kernels_pallas.nsa.interface import Case, Operators
from kernels_pallas.nsa.mosaic_gpu import target

Implementation = Literal["xla", "mosaic_gpu"]
"""The keys of `IMPLEMENTATIONS`."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One implementation."""

    load: Callable[[], Operators]
    """Imports it."""
    reason_against: Callable[[Case], str | None]
    """Why it cannot take a call; None if it can."""
    reason_against_default: Callable[[Case], str | None] = lambda case: None
    """Why a call that it could take does not get it unless it is named; None if it does."""


def _mosaic_gpu() -> Operators:
    from kernels_pallas.nsa.mosaic_gpu.operators import OPERATORS

    return OPERATORS


def _xla() -> Operators:
    from kernels_pallas.nsa.xla.operators import OPERATORS

    return OPERATORS


_noted: contextvars.ContextVar[set[tuple[str, records.Key]] | None] = contextvars.ContextVar(
    "noted", default=None
)


@contextlib.contextmanager
def calls_noted() -> Iterator[set[tuple[str, records.Key]]]:
    """What calls that are traced in here run as: names of implementations with the keys of the calls."""
    noted: set[tuple[str, records.Key]] = set()
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


IMPLEMENTATIONS: dict[str, Entry] = {
    "mosaic_gpu": Entry(_mosaic_gpu, target.reason_against, records.reason_against_default),
    "xla": Entry(_xla, lambda case: None),
}
"""The first that takes a call is the best."""


def operators_for(case: Case, name: str | None) -> Operators:
    """Those of the named implementation, or of the best that takes the case, which is logged at level DEBUG.

    Raises:
        ValueError: there is no implementation of this name.
        NotImplementedError: the named one cannot take the case; it is never replaced by another.
    """
    if name is not None:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(map(repr, IMPLEMENTATIONS))
            raise ValueError(f"nsa: implementation must be one of {known} or None, not {name!r}")
        entry = IMPLEMENTATIONS[name]
        if (reason := entry.reason_against(case)) is not None:
            others = " or ".join(repr(other) for other in IMPLEMENTATIONS if other != name)
            raise NotImplementedError(
                f"nsa: {case.operator} with implementation={name!r}: {reason}; use {others} or None"
            )
        return _taken(name, case)
    refused: list[str] = []
    for other, entry in IMPLEMENTATIONS.items():
        reason = entry.reason_against(case)
        if reason is None and (reason := entry.reason_against_default(case)) is None:
            _log.debug("%s runs as %s", case.operator, ": ".join([other, *refused]))
            return _taken(other, case)
        refused.append(f"{other}: {reason}")
    raise NotImplementedError(f"nsa: nothing takes {case.operator}: {'; '.join(refused)}")


def _taken(name: str, case: Case) -> Operators:
    if (noted := _noted.get()) is not None:
        noted.add((name, records.key_of(case)))
    return IMPLEMENTATIONS[name].load()
