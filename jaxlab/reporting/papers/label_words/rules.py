"""Claims I1 to I8 of Label Words are Anchors, and the rules that judge from numbers whether they were seen.

Every rule is a function of plain numbers. Where the numbers cannot speak about the claim (they are missing,
or the comparison is not a fair one) the verdict is "not examined" and says why. The page prints the
thresholds.
"""

import dataclasses
from collections.abc import Sequence

from jaxlab.reporting.formats import Number, mean, percent
from jaxlab.reporting.verdicts import Claim, Verdict

PAPER = "Label Words are Anchors, arXiv 2305.14160"

I1 = Claim("I1", "The flow from words to label words, S_wp, is large in shallow layers.", "fig. 3")
I2 = Claim("I2", "The flow from label words to the target, S_pq, is large in deep layers.", "fig. 3")
I3 = Claim("I3", "The flow between all other words, S_ww, is the smallest.", "fig. 3")
I4 = Claim(
    "I4",
    "Blocking label words in shallow layers hurts more than in deep ones, and more than blocking "
    "random words.",
    "fig. 4",
)
I5 = Claim("I5", "Attention to label words predicts the answer in middle and deep layers.", "fig. 5")
I6 = Claim("I6", "Re-weighting attention to label words beats plain in-context learning.", "table 1")
I7 = Claim("I7", "Hidden states of label words alone keep the predictions, and are faster.", "tables 2, 3")
I8 = Claim("I8", "Distances between the keys of label words predict the confusion matrix.", "fig. 6")
CLAIMS = (I1, I2, I3, I4, I5, I6, I7, I8)

BLOCKING_MARGIN = 0.05
"""I4: how much more accuracy one blocking must cost than another one."""


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
        return I1.unexamined("No flow shares in these runs.")
    shallow, deep = thirds(wp)
    evidence = (
        f"Share of S_wp: {percent(shallow)} in the first, {percent(deep)} in the last third of the layers."
    )
    return I1.verdict(rule, evidence, shallow > 1 / 3 and shallow > deep)


def i2(pq: Sequence[Number]) -> Verdict:
    """pq: the share of S_pq by layer."""
    rule = (
        "Seen if the share of S_pq, averaged over the last third of the layers, is above one third and "
        "above its average over the first third."
    )
    if not pq:
        return I2.unexamined("No flow shares in these runs.")
    shallow, deep = thirds(pq)
    evidence = (
        f"Share of S_pq: {percent(shallow)} in the first, {percent(deep)} in the last third of the layers."
    )
    return I2.verdict(rule, evidence, deep > 1 / 3 and deep > shallow)


def i3(wp: Sequence[Number], pq: Sequence[Number], ww: Sequence[Number]) -> Verdict:
    """The three shares by layer."""
    rule = (
        "Seen if S_ww is the smallest of the three shares in at least two thirds of the layers. The last "
        "layer is left out: there S_wp is 0 by definition, as the loss stands at the target alone."
    )
    layers = list(zip(wp, pq, ww, strict=True))[:-1]
    if not layers:
        return I3.unexamined("No flow shares of two or more layers in these runs.")
    smallest = sum(c < min(a, b) for a, b, c in layers)
    share = percent(mean(ww[:-1]))
    evidence = f"S_ww is the smallest in {smallest} of {len(layers)} layers; its mean share is {share}."
    return I3.verdict(rule, evidence, 3 * smallest >= 2 * len(layers))


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
        return I4.unexamined(
            "No blocking of label words in first and last layers, and of random words, in these runs."
        )
    evidence = (
        f"Accuracy {percent(accuracy)}; label words blocked in the first {layers} layers "
        f"{percent(label_first)}, in the last {layers} {percent(label_last)}; random words blocked in the "
        f"first {layers} {percent(random_first)}."
    )
    holds = min(label_last, random_first) - label_first >= BLOCKING_MARGIN
    return I4.verdict(rule, evidence, holds)
