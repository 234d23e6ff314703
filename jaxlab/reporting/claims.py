"""What the papers claim, and the form of a verdict on a claim."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["seen", "not seen", "not examined"]

NSA = "Native Sparse Attention, arXiv 2502.11089"
INJECTION = "Cross-Modal Skill Injection, arXiv 2605.19523"
ICL = "Label Words are Anchors, arXiv 2305.14160"


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, in our words, and where in the paper it stands."""

    id: str
    statement: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What a run says about a claim: decided by `rule` from the numbers in `evidence`."""

    claim: Claim
    status: Status
    rule: str
    evidence: str


CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(
            "N1",
            "A language model with NSA reaches a loss not above full attention's, at equal size and data.",
            "fig. 4, table 1",
        ),
        Claim("N2", "A needle is found at every depth of the trained length.", "fig. 5"),
        Claim(
            "N3", "NSA is faster than dense attention, the more so the longer the text.", "fig. 6, table 4"
        ),
        Claim("N4", "On long input NSA is better than sparsity without training.", "table 2"),
        Claim("N5", "NSA is better than the selectors that the paper rejects.", "sec. 6"),
        Claim("M1", "Instruction following transfers to images.", "abstract"),
        Claim("M2", "A cross-lingual skill transfers to images.", "abstract"),
        Claim("M3", "Mathematical reasoning does not transfer to images.", "abstract"),
        Claim("M4", "Task arithmetic and DARE lead the other operators.", "abstract"),
        Claim("M5", "Hyper-parameters decide over success and failure.", "abstract"),
        Claim("I1", "The flow from words to label words, S_wp, is large in shallow layers.", "fig. 3"),
        Claim("I2", "The flow from label words to the target, S_pq, is large in deep layers.", "fig. 3"),
        Claim("I3", "The flow between all other words, S_ww, is the smallest.", "fig. 3"),
        Claim(
            "I4",
            "Blocking label words in shallow layers hurts more than in deep ones, and more than blocking "
            "random words.",
            "fig. 4",
        ),
        Claim("I5", "Attention to label words predicts the answer in middle and deep layers.", "fig. 5"),
        Claim("I6", "Re-weighting attention to label words beats plain in-context learning.", "table 1"),
        Claim(
            "I7", "Hidden states of label words alone keep the predictions, and are faster.", "tables 2, 3"
        ),
        Claim("I8", "Distances between the keys of label words predict the confusion matrix.", "fig. 6"),
    )
}


def verdict(claim: str, rule: str, evidence: str, holds: bool | None) -> Verdict:
    """True is seen, False not seen, None not examined."""
    status: Status = "not examined" if holds is None else "seen" if holds else "not seen"
    return Verdict(CLAIMS[claim], status, rule, evidence)


def unexamined(claim: str, reason: str) -> Verdict:
    """A claim that nothing in these runs speaks about."""
    return verdict(claim, "", reason, None)
