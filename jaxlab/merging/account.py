"""The account of a merge: what became of every tensor of every input, merged, copied or refused, and the
digest of each that was saved.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxlab.checkpoints import host_tensors
from jaxlab.errors import UserError

Action = Literal["merged", "copied", "refused"]

_LISTED = 8
"""Tensors in a line; the others are counted together."""


@dataclasses.dataclass(frozen=True)
class AccountLine:
    """One tensor, by its name in a Hugging Face checkpoint."""

    name: str
    pattern: str
    """The name with {i} for the layer."""
    action: Action
    """refused: a tensor of an input that went nowhere."""
    models: tuple[str, ...]
    """The inputs that it came from."""
    reason: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    sha256: str = ""
    """Of its bytes in Hugging Face's shape, row-major; empty until `with_hashes`."""
    not_finite: int = 0
    """How many of its values are NaN or infinite."""

    def filled(self, identity: dict[str, Any]) -> "AccountLine":
        """The line with shape, dtype and digest."""
        return dataclasses.replace(self, **identity)


@dataclasses.dataclass(frozen=True)
class MergeAccount:
    """The lines of a merge."""

    lines: tuple[AccountLine, ...]
    family: str = "jaxlab"
    """Whose names the tensors have."""

    def with_hashes(self, params: Mapping[str, Any]) -> "MergeAccount":
        """The account with shape, dtype and digest of every tensor in the result `params`.

        Raises:
          ValueError: the result has a tensor that the account does not know, or lacks one that it
            does.
        """
        seen = {name: _identity(value) for name, value in host_tensors(params, self.family)}
        known = {line.name for line in self.lines if line.action != "refused"}
        if known != set(seen):
            raise ValueError(f"unaccounted: {sorted(known ^ set(seen))[:3]}")
        lines = (line if line.action == "refused" else line.filled(seen[line.name]) for line in self.lines)
        return MergeAccount(tuple(lines), self.family)

    def with_records(self, records: Mapping[str, Mapping[str, Any]]) -> "MergeAccount":
        """The account with what an engine found of each tensor: sha256 and not_finite.

        Raises:
          ValueError: a tensor has no record, or the account does not know one.
        """
        known = {line.name for line in self.lines if line.action != "refused"}
        if known != set(records):
            raise ValueError(f"unaccounted: {sorted(known ^ set(records))[:3]}")
        keys = ("sha256", "not_finite")
        lines = (
            line if line.action == "refused" else line.filled({k: records[line.name][k] for k in keys})
            for line in self.lines
        )
        return MergeAccount(tuple(lines), self.family)

    def not_finite(self) -> str:
        """How many NaN and infinities each tensor has; empty: none has any."""
        bad = [line for line in self.lines if line.not_finite]
        listed = ", ".join(f"{line.name} ({line.not_finite:,})" for line in bad[:_LISTED])
        if len(bad) > _LISTED:
            rest = sum(line.not_finite for line in bad[_LISTED:])
            listed += f" and {len(bad) - _LISTED:,} more tensors ({rest:,})"
        return listed

    def check_finite(self) -> None:
        """Refuses a result with NaN or infinities.

        Raises:
          UserError: it has some; how many of each tensor.
        """
        if bad := self.not_finite():
            raise UserError(
                f"NaN or infinite values would be in {bad}; `inspect --scan` tells which input has them, "
                "--allow-nonfinite writes them"
            )

    def wrong(self, found: Mapping[str, tuple[tuple[int, ...], str, str]]) -> list[str]:
        """Names of tensors whose shape, dtype and digest is not the account's; missing ones and unknown ones
        too.
        """
        want = {
            line.name: (tuple(line.shape), line.dtype, line.sha256)
            for line in self.lines
            if line.action != "refused"
        }
        return sorted(name for name in {**found, **want} if found.get(name) != want.get(name))

    def counts(self) -> dict[str, int]:
        """How many tensors are merged, copied and refused."""
        return {
            action: sum(line.action == action for line in self.lines)
            for action in ("merged", "copied", "refused")
        }

    def differences(self, params: Mapping[str, Any]) -> list[str]:
        """Names of the tensors of `params` whose digest, shape or dtype is not the account's; missing ones
        too.
        """
        seen = {name: _identity(value) for name, value in host_tensors(params, self.family)}
        return self.wrong({name: (v["shape"], v["dtype"], v["sha256"]) for name, v in seen.items()})

    def to_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(line) for line in self.lines]

    def table(self) -> str:
        """A short table: how many tensors of each kind went which way."""
        groups: dict[tuple[str, str, str, str], int] = collections.Counter()
        for line in self.lines:
            groups[(line.action, line.pattern, "+".join(line.models), line.reason)] += 1
        rows = [(action, str(n), *rest) for (action, *rest), n in groups.items()]
        rows.insert(0, ("action", "tensors", "name", "from", "reason"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(map(str.ljust, row, [*widths, 0])) for row in rows)


def _identity(value: np.ndarray) -> dict[str, Any]:
    return {
        "shape": value.shape,
        "dtype": value.dtype.name,
        "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
    }
