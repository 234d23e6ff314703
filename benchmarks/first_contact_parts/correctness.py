"""The check at 4,096 and 4,097 tokens: all that is asked of the kernels, for the record."""

import dataclasses
from typing import Any

from first_contact_parts.checks import item, placed
from first_contact_parts.steps import Item

from kernels_pallas.nsa.checking import CASES, CheckCase


def items(options: dict[str, Any], part: str) -> list[Item]:
    case = next(case for case in CASES if case.label == part)
    if options["tiny"]:
        case = tiny(case)
    return [item(f"{part} | {each}", case, each, placed(options)) for each in ("whole", "decode")]


def tiny(case: CheckCase) -> CheckCase:
    """For the interpreter: few queries and blocks."""
    length = case.length - 4096 + 256
    sizes = {"kv_heads": 1, "heads": case.groups, "key_dim": 64, "value_dim": 64, "window": 64}
    blocks = {"num_blocks": 2, "num_init": 0, "num_local": 1, "page_size": 128, "batches": (1,)}
    queries = (70, 131, length - 2, length - 1)
    return dataclasses.replace(case, length=length, queries=queries, **sizes, **blocks)
