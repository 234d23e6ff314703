"""Claims N1 to N5 of Native Sparse Attention, and the rules that judge from numbers whether they were seen.

Every rule is a function of plain numbers. Where the numbers cannot speak about the claim (they are missing,
or the comparison is not a fair one) the verdict is "not examined" and says why. The page prints the
thresholds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxlab.reporting.formats import Number, change, count, decimal, mean, percent
from jaxlab.reporting.verdicts import Claim, Verdict

PAPER = "Native Sparse Attention, arXiv 2502.11089"

N1 = Claim(
    "N1",
    "A language model with NSA reaches a loss not above full attention's, at equal size and data.",
    "fig. 4, table 1",
)
N2 = Claim("N2", "A needle is found at every depth of the trained length.", "fig. 5")
N3 = Claim("N3", "NSA is faster than dense attention, the more so the longer the text.", "fig. 6, table 4")
N4 = Claim("N4", "On long input NSA is better than sparsity without training.", "table 2")
N5 = Claim("N5", "NSA is better than the selectors that the paper rejects.", "sec. 6")
CLAIMS = (N1, N2, N3, N4, N5)

LOSS_TOLERANCE = 0.01
"""N1: how far NSA's loss may lie above full attention's: room for the noise of a single small run."""
SIZE_TOLERANCE = 0.01
"""N1: how much two models of equal size may differ in parameters."""
NEEDLE_FOUND = 0.95
"""N2: share of needles to be found at each depth."""
BUDGET_TOLERANCE = 0.1
"""N4: how much the tokens read by two methods of equal budget may differ."""


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
        return N1.unexamined("It needs a run with full attention and one with NSA.")
    size = abs(parameters[1] - parameters[0]) / parameters[0]
    seeds = f"{len(nsa)} seeds" if len(nsa) > 1 else "one seed"
    evidence = (
        f"Test loss {decimal(sparse)} with NSA, {decimal(dense)} with full attention "
        f"({change(sparse / dense - 1)}, {seeds}); {count(parameters[1])} and {count(parameters[0])} "
        "parameters."
    )
    if dense < sparse <= dense * (1 + LOSS_TOLERANCE):
        evidence += " Above full attention's, within what the rule leaves to noise."
    if size > SIZE_TOLERANCE or not data_equal:
        reason = "the models differ in size" if size > SIZE_TOLERANCE else "the data or the steps differ"
        return N1.verdict(rule, f"{evidence} Not a fair comparison: {reason}.", None)
    return N1.verdict(rule, evidence, sparse <= dense * (1 + LOSS_TOLERANCE))


def n2(found: Sequence[Number], length: int | None) -> Verdict:
    """found: shares of needles found by NSA, one for each depth (and seed), at the trained length."""
    rule = f"Seen if at least {percent(NEEDLE_FOUND)} of the needles are found at every depth."
    if not found or length is None:
        return N2.unexamined("No needle was searched for with NSA at its trained length.")
    evidence = (
        f"Found at {count(length)} tokens: {percent(min(found))} at the worst depth, {percent(mean(found))} "
        "on the mean."
    )
    return N2.verdict(rule, evidence, min(found) >= NEEDLE_FOUND)


class AttentionTimes(NamedTuple):
    """Seconds of one part of attention at one length: medians of calls in turn."""

    length: int
    part: str
    """forward or forward_backward."""
    dense: Number
    nsa: Number
    dense_used: Number | None
    """Seconds of processor, on a CPU."""
    nsa_used: Number | None

    @property
    def ratio(self) -> float:
        """NSA's time in dense attention's."""
        return self.nsa / self.dense

    @property
    def fair(self) -> tuple[Number, Number]:
        """Of dense attention and NSA, by the processor where that is known: fairer on a machine in use."""
        if self.dense_used and self.nsa_used:
            return self.dense_used, self.nsa_used
        return self.dense, self.nsa

    @property
    def ratio_used(self) -> float:
        return self.fair[1] / self.fair[0]


def n3(times: Sequence[AttentionTimes], device: str, training: str = "") -> Verdict:
    """times: of attention alone, forward and forward_backward, at two lengths or more; training: what is said
    beside of whole training steps."""
    rule = (
        "Seen if at the greatest length measured NSA's attention takes less time than the fastest dense "
        "attention that does not keep all scores, forward alone and with the backward pass, and a smaller "
        "part of it than at the least length. Judged only if, on a CPU, wall time and processor time agree."
    )
    lengths = sorted({point.length for point in times})
    shortest, longest = ([p for p in times if p.length == n] for n in (lengths[:1] + lengths[-1:]) or (0, 0))
    parts = {point.part for point in longest}
    if len(lengths) < 2 or parts != {"forward", "forward_backward"} or {p.part for p in shortest} != parts:
        return N3.unexamined("It needs the time of NSA's and of dense attention at two lengths.")

    def holds(ratio: Callable[[AttentionTimes], float]) -> bool:
        before = {point.part: ratio(point) for point in shortest}
        return all(ratio(point) < min(1.0, before[point.part]) for point in longest)

    told = "; ".join(
        f"at {count(n)} tokens " + " and ".join(f"{p.ratio_used:.2f} ({_PART[p.part]})" for p in points)
        for n in lengths
        if (points := [p for p in times if p.length == n])
    )
    on_cpu = all(point.nsa_used for point in times)
    kind = "processor time" if on_cpu else "time"
    evidence = f"NSA's {kind} in that of dense attention, on {device}: {told}. {training}".strip()
    by_wall, by_processor = holds(lambda p: p.ratio), holds(lambda p: p.ratio_used)
    if by_wall != by_processor:
        said = f"{evidence} Wall time says otherwise: the machine was too busy, or cores were used unequally."
        return N3.verdict(rule, said, None)
    return N3.verdict(rule, evidence, by_wall)


_PART = {"forward": "forward", "forward_backward": "with backward"}


def n3_training(full: Sequence[Number], nsa: Sequence[Number], length: int | None, device: str) -> Verdict:
    """full, nsa: training speeds in tokens per second, where attention alone was not timed."""
    rule = (
        "Seen if training with NSA reads more tokens per second than with full attention, at the length of "
        "these runs."
    )
    dense, sparse = mean(full), mean(nsa)
    if dense is None or sparse is None:
        return N3.unexamined("It needs the speed of a run with full attention and of one with NSA.")
    return N3.verdict(rule, training_speed(full, nsa, length, device), sparse > dense)


def training_speed(full: Sequence[Number], nsa: Sequence[Number], length: int | None, device: str) -> str:
    """The two training speeds in words; nothing where one is missing."""
    dense, sparse = mean(full), mean(nsa)
    if dense is None or sparse is None:
        return ""
    return (
        f"Training reads {count(sparse)} tokens/s with NSA, {count(dense)} with full attention "
        f"({sparse / dense:.2f} times) at {count(length)} tokens on {device}."
    )


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
        return N4.unexamined("It needs NSA and a training-free method on the same data.")
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
        return N4.verdict(rule, f"{evidence}no method reads as many tokens.", None)
    beaten = [own < value if by_loss else own > value for value in fair.values()]
    return N4.verdict(rule, f"{evidence}.", all(beaten))


def n5(losses: Mapping[str, Sequence[Number]]) -> Verdict:
    """losses: test losses by selector, one per seed; NSA's own is called NSA."""
    rule = "Seen if the test loss of NSA (mean over seeds) lies below that of every other selector."
    means = {name: sum(values) / len(values) for name, values in losses.items() if values}
    own = means.pop("NSA", None)
    if own is None or not means:
        return N5.unexamined("It needs NSA and another selector, trained on the same data.")
    others = ", ".join(f"{name} {decimal(value, 4)}" for name, value in means.items())
    return N5.verdict(rule, f"NSA {decimal(own, 4)}, {others}.", all(own < v for v in means.values()))
