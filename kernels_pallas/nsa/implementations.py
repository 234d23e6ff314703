"""The table of implementations: what each of them has, what it takes, and which one a call gets.

A new one is a folder like `xla/` or `mosaic_gpu/` with `Operators` in it, a name in `Implementation` and an
entry in `IMPLEMENTATIONS`. Only the one that a call gets is imported.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Literal

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
    reason_against_default: str | None = None
    """Why calls that name no implementation do not get it; None if they do."""


def _mosaic_gpu() -> Operators:
    from kernels_pallas.nsa.mosaic_gpu.operators import OPERATORS

    return OPERATORS


def _xla() -> Operators:
    from kernels_pallas.nsa.xla.operators import OPERATORS

    return OPERATORS


IMPLEMENTATIONS: dict[str, Entry] = {
    "mosaic_gpu": Entry(_mosaic_gpu, target.reason_against, target.REASON_AGAINST_DEFAULT),
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
        return entry.load()
    refused: list[str] = []
    for other, entry in IMPLEMENTATIONS.items():
        reason = entry.reason_against(case) or entry.reason_against_default
        if reason is None:
            _log.debug("%s runs as %s", case.operator, ": ".join([other, *refused]))
            return entry.load()
        refused.append(f"{other}: {reason}")
    raise NotImplementedError(f"nsa: nothing takes {case.operator}: {'; '.join(refused)}")
