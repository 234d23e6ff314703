"""The check of the package (`kernels_pallas.nsa.checking`) as items of a step."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from first_contact_parts.steps import Item, Row

from kernels_pallas.nsa import records
from kernels_pallas.nsa.checking import CheckCase, Prepared, prepare, rights
from kernels_pallas.target import interpreted

MOST = 1e30


def placed(options: dict[str, Any]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Where the kernels run."""
    return interpreted if options["tiny"] else contextlib.nullcontext


def item(
    name: str,
    case: CheckCase,
    part: Any,
    running: Callable[[], contextlib.AbstractContextManager[None]],
    gradients: bool = True,
) -> Item:
    make = functools.partial(prepare, case, part, running=running, gradients=gradients)
    return Item(name, make, rows)


def finite(error: float) -> float:
    """JSON knows no NaN."""
    return error if abs(error) < MOST else MOST


def rows(check: Prepared) -> list[Row]:
    findings = check.run()
    found: list[Row] = [
        {
            "case": check.case.label,
            "name": f.what,
            "right": f.right,
            "error": finite(f.error),
            "detail": f.detail,
        }
        for f in findings
    ]
    right = rights(check.part, check.keys, {f.what: f.right for f in findings})
    entries = [{**key._asdict(), "right": each} for key, each in sorted(right.items())]
    found[0]["record"] = entries
    found[0]["fact"] = {"device_kind": jax.devices()[0].device_kind, "kernels": records.kernels_hash()}
    found[0]["fact"] |= records.versions()
    return found
