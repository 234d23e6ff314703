"""The rules that decide from a run's numbers whether a claim was seen. The page prints their thresholds.

Every rule is a function of plain numbers. Where the numbers cannot speak about the claim (they are missing,
or the comparison is not a fair one) the verdict is "not examined" and says why.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxlab.reporting.claims import Verdict, unexamined, verdict
from jaxlab.reporting.formats import Number, change, count, decimal, mean, percent

LOSS_TOLERANCE = 0.01
"""N1: how far NSA's loss may lie above full attention's: room for the noise of a single small run."""
SIZE_TOLERANCE = 0.01
"""N1: how much two models of equal size may differ in parameters."""
NEEDLE_FOUND = 0.95
"""N2: share of needles to be found at each depth."""
BUDGET_TOLERANCE = 0.1
"""N4: how much the tokens read by two methods of equal budget may differ."""
TRANSFER_GAIN = 0.20
"""M1-M3: accuracy on images, over the VLM without injection, from which a skill has arrived."""
TRANSFER_SHARE = 0.50
"""M1-M3: the part of the donor's own accuracy that must be reached on images."""
DONOR_SKILL = 0.50
"""M1-M3: a donor below this accuracy on its own modality has no skill of which a transfer could be judged."""
LEAD_TOLERANCE = 0.01
"""M4: how far below the best of the others task arithmetic and DARE may lie."""
DECISIVE = 0.20
"""M5: the distance of the best setting from the median setting."""
BLOCKING_MARGIN = 0.05
"""I4: how much more accuracy one blocking must cost than another one."""


# Native sparse attention.


def n1(
    full: Sequence[Number], nsa: Sequence[Number], parameters: tuple[int, int], data_equal: bool
) -> Verdict:
    """full, nsa: test losses, one per seed; parameters: of the two models."""
    rule = (
        f"Seen if the test loss of NSA is at most {percent(LOSS_TOLERANCE)} above full attention's (mean "
        f"over seeds). Judged only if parameters differ by at most {percent(SIZE_TOLERANCE)} and both read "
        "the same data."
    )
    dense, sparse = mean(full), mean(nsa)
    if dense is None or sparse is None:
        return unexamined("N1", "It needs a run with full attention and one with NSA.")
    size = abs(parameters[1] - parameters[0]) / parameters[0]
    evidence = (
        f"Test loss {decimal(sparse)} with NSA, {decimal(dense)} with full attention "
        f"({change(sparse / dense - 1)}); {count(parameters[1])} and {count(parameters[0])} parameters."
    )
    if size > SIZE_TOLERANCE or not data_equal:
        reason = "the models differ in size" if size > SIZE_TOLERANCE else "the data or the steps differ"
        return verdict("N1", rule, f"{evidence} Not a fair comparison: {reason}.", None)
    return verdict("N1", rule, evidence, sparse <= dense * (1 + LOSS_TOLERANCE))


def n2(found: Sequence[Number], length: int | None) -> Verdict:
    """found: shares of needles found by NSA, one for each depth (and seed), at the trained length."""
    rule = f"Seen if at least {percent(NEEDLE_FOUND)} of the needles are found at every depth."
    if not found or length is None:
        return unexamined("N2", "No needle was searched for with NSA at its trained length.")
    evidence = (
        f"Found at {count(length)} tokens: {percent(min(found))} at the worst depth, {percent(mean(found))} "
        "on the mean."
    )
    return verdict("N2", rule, evidence, min(found) >= NEEDLE_FOUND)


def n3(full: Sequence[Number], nsa: Sequence[Number], length: int | None, device: str) -> Verdict:
    """full, nsa: training speeds in tokens per second."""
    rule = (
        "Seen if training with NSA reads more tokens per second than with full attention, at the length of "
        "these runs."
    )
    dense, sparse = mean(full), mean(nsa)
    if dense is None or sparse is None:
        return unexamined("N3", "It needs the speed of a run with full attention and of one with NSA.")
    evidence = (
        f"{count(sparse)} tokens/s with NSA, {count(dense)} with full attention ({sparse / dense:.2f} "
        f"times) at {count(length)} tokens on {device}. The paper's speed-ups are of its own kernels at 8k "
        "to 64k tokens."
    )
    return verdict("N3", rule, evidence, sparse > dense)


def n4(
    nsa: Sequence[tuple[Number, Number]],
    methods: Mapping[str, Sequence[tuple[Number, Number]]],
    *,
    by_loss: bool,
) -> Verdict:
    """nsa, methods: (tokens read per query, measure) of runs on one data set; the measure is a loss or an
    accuracy."""
    better = "below" if by_loss else "above"
    rule = (
        f"Seen if NSA's {'loss' if by_loss else 'accuracy'} (mean over seeds) lies {better} that of every "
        f"training-free method that reads at least {percent(1 - BUDGET_TOLERANCE)} of as many tokens as NSA "
        f"and at most {percent(1 + BUDGET_TOLERANCE)}."
    )
    read, own = mean([tokens for tokens, _ in nsa]), mean([value for _, value in nsa])
    if read is None or own is None or not methods:
        return unexamined("N4", "It needs NSA and a training-free method on the same data.")
    fair = {}
    for name, points in methods.items():
        equal = [value for tokens, value in points if abs(tokens / read - 1) <= BUDGET_TOLERANCE]
        if equal:
            fair[name] = sum(equal) / len(equal)
    told = lambda value: decimal(value, 3) if by_loss else percent(value, 1)
    evidence = f"NSA {told(own)} at {decimal(read, 0)} tokens read; " + ", ".join(
        f"{name} {told(value)}" for name, value in fair.items()
    )
    if not fair:
        return verdict("N4", rule, f"{evidence}no method reads as many tokens.", None)
    beaten = [own < value if by_loss else own > value for value in fair.values()]
    return verdict("N4", rule, f"{evidence}.", all(beaten))


def n5(losses: Mapping[str, Sequence[Number]]) -> Verdict:
    """losses: test losses by selector, one per seed; NSA's own is called NSA."""
    rule = "Seen if the test loss of NSA (mean over seeds) lies below that of every other selector."
    means = {name: sum(values) / len(values) for name, values in losses.items() if values}
    own = means.pop("NSA", None)
    if own is None or not means:
        return unexamined("N5", "It needs NSA and another selector, trained on the same data.")
    others = ", ".join(f"{name} {decimal(value, 4)}" for name, value in means.items())
    return verdict("N5", rule, f"NSA {decimal(own, 4)}, {others}.", all(own < v for v in means.values()))


# Skill injection.


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
        gain = self.injected - self.alone
        return gain >= TRANSFER_GAIN and self.injected >= TRANSFER_SHARE * self.donor

    @property
    def told(self) -> str:
        return (
            f"On images {percent(self.alone)} without and {percent(self.injected)} with injection; the "
            f"expert itself {percent(self.donor)} on text; the VLM's own skill {percent(self.own)} before, "
            f"{percent(self.kept)} after."
        )


TRANSFER_RULE = (
    f"A skill has transferred if accuracy on images rises by at least {100 * TRANSFER_GAIN:.0f} points and "
    f"reaches {percent(TRANSFER_SHARE)} of the expert's own on text. Judged only if the expert itself "
    f"reaches {percent(DONOR_SKILL)}."
)


def transfers(claim: str, transfer: Transfer | None, expected: bool = True) -> Verdict:
    """M1 and M2 (a skill that should arrive) and M3 (one that should not)."""
    if transfer is None:
        return unexamined(claim, "No scenario of this kind in the search.")
    rule = (
        TRANSFER_RULE if expected else f"{TRANSFER_RULE} The claim is seen if the skill has not transferred."
    )
    if transfer.donor < DONOR_SKILL:
        return verdict(claim, rule, f"The expert itself has too little of the skill. {transfer.told}", None)
    return verdict(claim, rule, transfer.told, transfer.arrived == expected)


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
        return unexamined(
            "M4", "It needs task arithmetic, DARE and at least one other operator in the search."
        )
    best_dare, best_other = max(dare, key=scores.__getitem__), max(others, key=scores.__getitem__)
    evidence = (
        ", ".join(f"{name} {percent(scores[name], 1)}" for name in sorted(scores, key=lambda n: -scores[n]))
        + "."
    )
    if len({evaluations[name] for name in scores}) > 1:
        return verdict("M4", rule, f"{evidence} The operators had different numbers of evaluations.", None)
    if max(scores.values()) < TRANSFER_GAIN:
        return verdict("M4", rule, f"{evidence} None of them moved enough to be told apart.", None)
    lead = min(scores["task_arithmetic"], scores[best_dare]) >= scores[best_other] - LEAD_TOLERANCE
    return verdict("M4", rule, evidence, lead)


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
        return unexamined("M5", "It needs more than one setting in the search.")
    evidence = (
        "; ".join(f"{name}: best {percent(a)}, median {percent(b)}" for name, (a, b) in spreads.items()) + "."
    )
    wide = sum(a - b >= DECISIVE for a, b in spreads.values())
    return verdict("M5", rule, evidence, 2 * wide > len(spreads))


# In-context learning.


def judged_if_able(verdict: Verdict, accuracy: Number | None, chance: Number | None) -> Verdict:
    """The verdict; "not examined" of a model that hardly learns in context, whose flows tell nothing."""
    rule = (
        f"{verdict.rule} Judged only if the model answers at least halfway between guessing and always right."
    )
    if verdict.status == "not examined":
        return verdict
    if accuracy is None or chance is None or accuracy < (1 + chance) / 2:
        able = f"{percent(accuracy)} of the time, by guessing {percent(chance)}"
        told = f"{verdict.evidence} But the model is right only {able}."
        return dataclasses.replace(verdict, status="not examined", rule=rule, evidence=told)
    return dataclasses.replace(verdict, rule=rule)


def thirds(values: Sequence[Number]) -> tuple[float, float]:
    """The mean over the first and over the last third of the layers (at least one layer each)."""
    size = max(1, len(values) // 3)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def i1(wp: Sequence[Number]) -> Verdict:
    """wp: the share of S_wp in S_wp + S_pq + S_ww by layer."""
    rule = (
        "Seen if the share of S_wp, averaged over the first third of the layers, is above one third (what "
        "equal shares would give) and above its average over the last third."
    )
    if not wp:
        return unexamined("I1", "No flow shares in these runs.")
    shallow, deep = thirds(wp)
    evidence = (
        f"Share of S_wp: {percent(shallow)} in the first, {percent(deep)} in the last third of the layers."
    )
    return verdict("I1", rule, evidence, shallow > 1 / 3 and shallow > deep)


def i2(pq: Sequence[Number]) -> Verdict:
    """pq: the share of S_pq by layer."""
    rule = (
        "Seen if the share of S_pq, averaged over the last third of the layers, is above one third and "
        "above its average over the first third."
    )
    if not pq:
        return unexamined("I2", "No flow shares in these runs.")
    shallow, deep = thirds(pq)
    evidence = (
        f"Share of S_pq: {percent(shallow)} in the first, {percent(deep)} in the last third of the layers."
    )
    return verdict("I2", rule, evidence, deep > 1 / 3 and deep > shallow)


def i3(wp: Sequence[Number], pq: Sequence[Number], ww: Sequence[Number]) -> Verdict:
    """The three shares by layer."""
    rule = (
        "Seen if S_ww is the smallest of the three shares in at least two thirds of the layers. The last "
        "layer is left out: there S_wp is 0 by definition, as the loss stands at the target alone."
    )
    layers = list(zip(wp, pq, ww, strict=True))[:-1]
    if not layers:
        return unexamined("I3", "No flow shares of two or more layers in these runs.")
    smallest = sum(c < min(a, b) for a, b, c in layers)
    share = percent(mean(ww[:-1]))
    evidence = f"S_ww is the smallest in {smallest} of {len(layers)} layers; its mean share is {share}."
    return verdict("I3", rule, evidence, 3 * smallest >= 2 * len(layers))


def i4(
    accuracy: Number | None,
    label_first: Number | None,
    label_last: Number | None,
    random_first: Number | None,
    layers: int | None,
) -> Verdict:
    """Accuracy without blocking, with label words blocked in the first and in the last `layers`, and with as
    many random words blocked in the first ones.
    """
    points = f"{100 * BLOCKING_MARGIN:.0f} points"
    rule = (
        f"Seen if blocking label words in the first layers costs at least {points} more accuracy than in "
        f"the last layers, and at least {points} more than blocking as many random words in the first "
        "layers; at the greatest number of layers that was tried for which the first and the last do not "
        "overlap."
    )
    if accuracy is None or label_first is None or label_last is None or random_first is None:
        return unexamined(
            "I4", "No blocking of label words in first and last layers, and of random words, in these runs."
        )
    evidence = (
        f"Accuracy {percent(accuracy)}; label words blocked in the first {layers} layers "
        f"{percent(label_first)}, in the last {layers} {percent(label_last)}; random words blocked in the "
        f"first {layers} {percent(random_first)}."
    )
    holds = min(label_last, random_first) - label_first >= BLOCKING_MARGIN
    return verdict("I4", rule, evidence, holds)
