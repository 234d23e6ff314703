"""Claims I1 to I8 of Label Words are Anchors, and the rules that judge from numbers whether they were seen.

Every rule is a function of plain numbers. Where the numbers cannot speak about the claim (they are missing,
or the comparison is not a fair one) the verdict is "not examined" and says why. The page prints the
thresholds.
"""

import dataclasses
from collections.abc import Mapping, Sequence

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
"""I4: how much more loyalty one blocking must cost than another one."""
CORRELATION = 0.5
"""I8: how well predicted and real confusion must agree."""


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


@dataclasses.dataclass(frozen=True)
class Loyalty:
    """Of one measure: label words blocked in the first and in the last layers, random words in the first."""

    label_first: Number
    label_last: Number
    random_first: Number

    @property
    def drop(self) -> Number:
        """How much less is kept without label words in the first layers than at best in the others."""
        return min(self.label_last, self.random_first) - self.label_first

    def told(self, name: str) -> str:
        return (
            f"{name}: {percent(self.label_first)} with label words blocked in the first layers, "
            f"{percent(self.label_last)} in the last, {percent(self.random_first)} with random words blocked "
            "in the first"
        )


def i4(word: Loyalty | None, label: Loyalty | None, accuracy: Loyalty | None, layers: int | None) -> Verdict:
    """Word loyalty, label loyalty and accuracy with `layers` layers blocked; None where not measured,
    or where one label alone is predicted, which leaves the latter two undefined."""
    points = f"{100 * BLOCKING_MARGIN:.0f} points"
    rule = (
        f"Seen if blocking label words in the first layers costs at least {points} more word loyalty than in "
        "the last layers, and than blocking as many random words in the first ones, and likewise of label "
        "loyalty where it is defined (where the model predicts one label alone, it is not). At the greatest "
        "number of layers that was tried for which the first and the last do not overlap. Accuracy stands "
        "beside it and does not decide, as in the paper."
    )
    if word is None:
        return I4.unexamined(
            "No blocking of label words in first and last layers, and of random words, in these runs."
        )
    told = [f"{layers} layers blocked. {word.told('Word loyalty')}"]
    told.append("label loyalty is undefined" if label is None else label.told("label loyalty"))
    if accuracy is not None:
        told.append(accuracy.told("accuracy"))
    holds = all(one is None or one.drop >= BLOCKING_MARGIN for one in (word, label))
    return I4.verdict(rule, "; ".join(told) + ".", holds)


def i5(aucroc: Sequence[Sequence[Number | None]]) -> Verdict:
    """aucroc: by seed and layer; None where a seed's predictions are of one label."""
    rule = (
        "Seen if AUCROC, averaged over the last third of the layers, is above .5 (what chance gives) and, "
        "like that of the middle third, above its average over the first third, in every seed that defines "
        "it."
    )
    if not aucroc:
        return I5.unexamined("No attention to label words in these runs.")
    known = [[x for x in seed if x is not None] for seed in aucroc if None not in seed]
    if not known:
        return I5.unexamined("The model predicts one label alone, so AUCROC is undefined.")
    each = [(*thirds(seed)[:1], _middle(seed), thirds(seed)[1]) for seed in known]
    told = "; ".join(", ".join(f"{x:.2f}" for x in seed) for seed in each)
    best = [mean([seed[layer] for seed in known]) or 0.0 for layer in range(len(known[0]))]
    top = max(range(len(best)), key=best.__getitem__)
    evidence = (
        f"AUCROC by thirds of the layers, a seed each: {told}. Best mean {best[top]:.2f}, layer {top + 1}."
    )
    return I5.verdict(
        rule, evidence, all(last > max(0.5, first) and mid > first for first, mid, last in each)
    )


def i6(
    reweighted: Sequence[Number | None], plain: dict[int, Sequence[Number | None]], single: str | None = None
) -> Verdict:
    """Accuracies by seed: with learned factors, and without them by number of demonstrations of each class.

    Args:
      single: the one label that is ever predicted with the factors.
    """
    rule = (
        "Seen if the mean accuracy with learned factors is above that of every number of demonstrations "
        "without them (the paper: 1 and 5 of each class), by at least one point."
    )
    if not reweighted or not plain:
        return I6.unexamined("No re-weighting beside plain in-context learning in these runs.")
    known = lambda values: [x for x in values if x is not None]
    own, others = mean(known(reweighted)), {shots: mean(known(x)) for shots, x in plain.items()}
    best = [x for x in others.values() if x is not None]
    if own is None or not best:
        return I6.unexamined("Accuracy is undefined: no prompt has a prediction.")
    told = ", ".join(f"{shots} shots {percent(x, 1)}" for shots, x in others.items())
    seeds = ", ".join(percent(x, 1) for x in reweighted)
    evidence = f"Re-weighted {percent(own, 1)} ({seeds} by seed); without: {told}."
    if single is not None:
        evidence += f" With the factors the model predicts {single} alone."
    return I6.verdict(rule, evidence, own - max(best) >= 0.01)


def i7(
    methods: Mapping[str, Mapping[str, Number | None]],
    speed_up: Number | None,
    label_defined: bool,
    against_cache: Number | None = None,
) -> Verdict:
    """methods: label and word loyalty of each method; speed_up: against reading the whole prompt, and
    against going on from a cache of all demonstrations."""
    rule = (
        "Seen if Hidden_anchor keeps more word loyalty, and where it is defined more label loyalty, than "
        "Text_anchor, Hidden_random and Hidden_random-top, and a query takes less wall-clock time from it "
        "than from the whole prompt."
    )
    if not methods or speed_up is None:
        return I7.unexamined("No compression of demonstrations in these runs.")
    measures = ("word_loyalty", "label_loyalty") if label_defined else ("word_loyalty",)
    known = {
        method: {name: x for name in measures if (x := values[name]) is not None}
        for method, values in methods.items()
    }
    if any(len(values) < len(measures) for values in known.values()):
        return I7.unexamined("The loyalty of a method is undefined: no prompt has a prediction with it.")
    own = known["hidden_anchor"]
    others = {n: m for n, m in known.items() if n not in ("full", "hidden_anchor")}
    best = all(own[name] > other[name] for name in measures for other in others.values())
    told = "; ".join(
        f"{name} " + " / ".join(percent(m[x]) for x in measures)
        for name, m in known.items()
        if name != "full"
    )
    speed = f"{speed_up:.2f} times as fast as the whole prompt"
    if against_cache is not None:
        speed += f", {against_cache:.2f} times as fast as from a cache of all demonstrations"
    kept = " / ".join(name.replace("_", " ") for name in measures)
    return I7.verdict(rule, f"{kept}: {told}. {speed}.", best and speed_up > 1.0)


def i8(pearson: Number | None, spearman: Number | None, labels: int | None) -> Verdict:
    """Correlations of predicted and real confusion over the pairs of labels."""
    rule = (
        f"Seen if predicted and real confusion correlate over the pairs of labels by at least {CORRELATION} "
        "(Pearson, of means over seeds); it takes three labels or more, and a model that confuses some more "
        "than others."
    )
    if labels is None:
        return I8.unexamined("No diagnosis of errors in these runs.")
    if pearson is None:
        few = f"{labels} labels have too few pairs" if labels < 3 else "all pairs are confused alike"
        return I8.unexamined(f"A correlation is undefined: {few}.")
    evidence = f"Correlation over the pairs of {labels} labels: {pearson:.2f} (ranks: {spearman or 0.0:.2f})."
    return I8.verdict(rule, evidence, pearson >= CORRELATION)


def _middle(values: Sequence[Number]) -> Number:
    size = max(1, len(values) // 3)
    inner = values[size:-size] or values
    return sum(inner) / len(inner)
