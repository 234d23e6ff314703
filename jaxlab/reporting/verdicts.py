"""A claim of a paper, and the verdict of runs on it."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["seen", "not seen", "not examined"]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, in our words, and where in the paper it stands."""

    id: str
    statement: str
    source: str

    def verdict(self, rule: str, evidence: str, holds: bool | None) -> "Verdict":
        """True is seen, False not seen, None not examined."""
        status: Status = "not examined" if holds is None else "seen" if holds else "not seen"
        return Verdict(self, status, rule, evidence)

    def unexamined(self, reason: str) -> "Verdict":
        """Nothing in these runs speaks about the claim."""
        return self.verdict("", reason, None)


@dataclass(frozen=True)
class Verdict:
    """What runs say about a claim: decided by `rule` from the numbers in `evidence`."""

    claim: Claim
    status: Status
    rule: str
    evidence: str
