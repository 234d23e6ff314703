"""From findings to a record: what of the kernels is right."""

from collections.abc import Iterable, Mapping
from typing import Any

from kernels_pallas.nsa.checking.cases import CheckCase
from kernels_pallas.nsa.decoding import ONE_TOKEN
from kernels_pallas.nsa.records import Key, Record, kernels_hash, padded, versions

_OF = {
    "compressed": "compressed_attention",
    "lse": "compressed_attention",
    "choice": "select_blocks",
    "selected": "selected_attention",
    "window": "window_attention",
    "cmp": "compressed_attention",
    "slc": "selected_attention",
    "win": "window_attention",
}


def operator_of(what: str) -> str | None:
    """The operator that a finding of the whole attention is about; None: it may be any."""
    return _OF.get(what.removeprefix("d_k_").removeprefix("d_v_").removeprefix("d_"))


def rights(part: str, keys: Iterable[Key], findings: Mapping[str, bool]) -> dict[Key, bool]:
    """Which kernels a check found right: findings by their names, and whether each is right. An operator is
    right if all is that may be about it: everything, for one that no finding names. With no finding at all
    nothing is right."""
    named = set(_OF.values()) if part == "whole" else set()

    def concerns(what: str, key: Key) -> bool:
        return key.operator not in named or operator_of(what) in (None, key.operator)

    found = {}
    for key in keys:
        about = [right for what, right in findings.items() if concerns(what, key)]
        found[key] = bool(about) and all(about)
    return found


def record_of(
    device_kind: str,
    results: Iterable[Mapping[Key, bool]],
    failures: Iterable[tuple[CheckCase, str]],
    more_versions: Mapping[str, str],
    facts: Mapping[str, Any],
) -> Record:
    """A record of many checks: a kernel is right if it was in all of them, and none of its sizes failed."""
    right: dict[Key, bool] = {}
    for result in results:
        for key, each in result.items():
            right[key] = right.get(key, True) and each
    for case, part in failures:
        for key in right:
            if _concerns(case, part, key):
                right[key] = False
    return Record(device_kind, {**more_versions, **versions()}, kernels_hash(), right, dict(facts))


def _concerns(case: CheckCase, part: str, key: Key) -> bool:
    """Whether a check that gave no findings would have been about these kernels."""
    dims = (padded(case.key_dim), padded(case.value_dim))
    same = (case.dtype, case.groups, dims[0]) == (key.dtype, key.group, key.key_dim)
    one_token = key.operator == ONE_TOKEN
    return same and key.value_dim in (0, dims[1]) and one_token == (part == "decode")
