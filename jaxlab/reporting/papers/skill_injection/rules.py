"""Claims M1 to M5 of Skill Injection, and the rules that judge from numbers whether they were seen.

Every rule is a function of plain numbers. Where the numbers cannot speak about the claim (they are missing,
or the comparison is not a fair one) the verdict is "not examined" and says why. The page prints the
thresholds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxlab.reporting.formats import Number, percent
from jaxlab.reporting.verdicts import Claim, Verdict

PAPER = "Cross-Modal Skill Injection, arXiv 2605.19523"

M1 = Claim("M1", "Instruction following transfers to images.", "abstract")
M2 = Claim("M2", "A cross-lingual skill transfers to images.", "abstract")
M3 = Claim("M3", "Mathematical reasoning does not transfer to images.", "abstract")
M4 = Claim("M4", "Task arithmetic and DARE lead the other operators.", "abstract")
M5 = Claim("M5", "Hyper-parameters decide over success and failure.", "abstract")
CLAIMS = (M1, M2, M3, M4, M5)

TRANSFER_GAIN = 0.20
"""M1-M3: accuracy on images, over the VLM without injection, from which a skill has arrived."""
TRANSFER_SHARE = 0.50
"""M1-M3: the part of the donor's own accuracy that must be reached on images."""
DONOR_SKILL = 0.50
"""M1-M3: a donor below this accuracy on its own modality has no skill of which a transfer could be judged."""
BORDER = 0.05
"""M1-M3: so near to what counts as transferred a verdict is called borderline."""
LEAD_TOLERANCE = 0.01
"""M4: how far below the best of the others task arithmetic and DARE may lie."""
DECISIVE = 0.20
"""M5: the distance of the best setting from the median setting."""


@dataclass(frozen=True)
class Transfer:
    """Accuracies of one scenario: the skill on images before and after, and what donor and receiver can do.

    The injected model is the best of all operators: chosen on the validation split, measured on the test
    split.
    """

    scenario: str
    alone: Number
    injected: Number
    donor: Number
    own: Number
    kept: Number

    @property
    def arrived(self) -> bool:
        return self.margin >= 0

    @property
    def margin(self) -> float:
        """By how much both conditions of a transfer are met; negative where one is not."""
        return min(self.injected - self.alone - TRANSFER_GAIN, self.injected - TRANSFER_SHARE * self.donor)

    @property
    def told(self) -> str:
        return (
            f"On images {percent(self.alone)} without and {percent(self.injected)} with injection; the "
            f"expert itself {percent(self.donor)} on text; the VLM's own skill {percent(self.own)} before, "
            f"{percent(self.kept)} after."
        )

    @property
    def border(self) -> str:
        """Words for a verdict that hangs on little."""
        if abs(self.margin) >= BORDER:
            return ""
        side = "above" if self.arrived else "below"
        return f" Borderline: {100 * abs(self.margin):.1f} points {side} what counts as transferred."


TRANSFER_RULE = (
    f"A skill has transferred if accuracy on images rises by at least {100 * TRANSFER_GAIN:.0f} points and "
    f"reaches {percent(TRANSFER_SHARE)} of the expert's own on text. Judged only if the expert itself "
    f"reaches {percent(DONOR_SKILL)}."
)


def transfers(claim: Claim, transfer: Transfer | None, expected: bool = True) -> Verdict:
    """M1 and M2 (a skill that should arrive) and M3 (one that should not)."""
    if transfer is None:
        return claim.unexamined("No scenario of this kind in the search.")
    rule = (
        TRANSFER_RULE if expected else f"{TRANSFER_RULE} The claim is seen if the skill has not transferred."
    )
    if transfer.donor < DONOR_SKILL:
        return claim.verdict(rule, f"The expert itself has too little of the skill. {transfer.told}", None)
    return claim.verdict(rule, transfer.told + transfer.border, transfer.arrived == expected)


def m4(scores: Mapping[str, Number], evaluations: Mapping[str, int]) -> Verdict:
    """scores: test accuracy per operator, a mean over scenarios; evaluations: settings tried per operator."""
    rule = (
        "Seen if task arithmetic and the best DARE variant each reach the best other operator to within "
        f"{100 * LEAD_TOLERANCE:.0f} point, each tuned on the validation split, measured on the test split, "
        "averaged over scenarios. Judged only if every operator was given the same number of evaluations "
        f"and the best one reaches {percent(TRANSFER_GAIN)}."
    )
    dare = [name for name in scores if name.startswith("dare")]
    others = [name for name in scores if name != "task_arithmetic" and name not in dare]
    if "task_arithmetic" not in scores or not dare or not others:
        return M4.unexamined("It needs task arithmetic, DARE and at least one other operator in the search.")
    best_dare, best_other = max(dare, key=scores.__getitem__), max(others, key=scores.__getitem__)
    evidence = (
        ", ".join(f"{name} {percent(scores[name], 1)}" for name in sorted(scores, key=lambda n: -scores[n]))
        + "."
    )
    if len({evaluations[name] for name in scores}) > 1:
        return M4.verdict(rule, f"{evidence} The operators had different numbers of evaluations.", None)
    if max(scores.values()) < TRANSFER_GAIN:
        return M4.verdict(rule, f"{evidence} None of them moved enough to be told apart.", None)
    least = min(scores["task_arithmetic"], scores[best_dare]) - scores[best_other]
    evidence += (
        f" The lesser of task arithmetic and {best_dare} lies {100 * abs(least):.1f} points "
        f"{'above' if least >= 0 else 'below'} {best_other}."
    )
    return M4.verdict(rule, evidence, least >= -LEAD_TOLERANCE)


def m5(grids: Mapping[str, Sequence[Number]]) -> Verdict:
    """grids: per scenario, the accuracy of every setting that was tried."""
    rule = (
        f"Seen if in most scenarios the best setting lies at least {100 * DECISIVE:.0f} points above the "
        "median of all settings tried (validation split)."
    )
    spreads = {}
    for name, values in grids.items():
        ordered = sorted(values)
        if len(ordered) > 1:
            spreads[name] = (ordered[-1], ordered[len(ordered) // 2])
    if not spreads:
        return M5.unexamined("It needs more than one setting in the search.")
    evidence = (
        "; ".join(f"{name}: best {percent(a)}, median {percent(b)}" for name, (a, b) in spreads.items()) + "."
    )
    wide = sum(a - b >= DECISIVE for a, b in spreads.values())
    return M5.verdict(rule, evidence, 2 * wide > len(spreads))
