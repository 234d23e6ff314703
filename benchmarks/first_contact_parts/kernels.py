"""Every kernel by itself on 256 tokens: does it run at all, operands of wgmma in registers and without."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from first_contact_parts.checks import item, placed
from first_contact_parts.steps import Item

from kernels_pallas.nsa.checking import SMALL_CASES
from kernels_pallas.nsa.checking.cases import PARTS
from kernels_pallas.nsa.mosaic_gpu import tuning


def items(options: dict[str, Any], part: str) -> list[Item]:
    order, way = part.split(", ")
    case = SMALL_CASES[order == "by blocks"]
    forced = {"registers": way == "registers"}
    if options["tiny"]:
        case = dataclasses.replace(
            case, heads=case.groups, kv_heads=1, key_dim=64, value_dim=64, batches=(1,)
        )
        case = dataclasses.replace(case, queries=(70, 131, 254, 255))
        forced = {"registers": False, "warpgroups": 1}

    @contextlib.contextmanager
    def running() -> Iterator[None]:
        with placed(options)(), tuning.forced(**forced):
            yield

    forward = [item(f"{p}, forward", case, p, running, gradients=False) for p in PARTS]
    backward = [
        item(f"{p}, backward", case, p, running) for p in PARTS if p not in ("select_blocks", "decode")
    ]
    return [*forward, *backward]
