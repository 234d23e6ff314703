"""Where a tensor, or many, are cut so that so many of their largest elements remain: exact, from one pass
over a stream, and a second one where a sample misled.

A sample says between which two values the cut lies, a bracket. The pass counts what is above it and keeps
the few values in it, of which the cut is then one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8, UInt32

from jaxlab.merging.numerics import Cut

Bits = UInt32[np.ndarray, " n"]
"""`magnitude_bits` of a chunk."""

LAST = 0x7FFFFFFF
"""No magnitude has greater bits."""
HELD = 1 << 27
"""Values that may be held at most; a pass that finds more is followed by a finer one."""
NOTHING = Cut.at(0xFFFFFFFF, 0)
"""Keeps no element."""


class Found(NamedTuple):
    """The value that was sought, and how many elements equal to it belong to those wanted."""

    threshold: int
    ties: int
    """Of them the first."""
    all_ties: int


class Tally:
    """What one pass notes of a score for one bracket, chunk by chunk."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.above = 0
        self.lengths: list[int] = []
        """Elements of each chunk."""
        self._held = 0
        self._edges: list[tuple[int, int]] = []
        self._inside: list[tuple[np.ndarray, np.ndarray | None]] = []
        """Values strictly between the edges, and how often each is there; None: once."""

    def add(self, bits: Bits, sides: UInt8[np.ndarray, " n"]) -> None:
        """The next chunk; `sides` as `Scores` has them."""
        self.lengths.append(len(bits))
        self.above += int(np.count_nonzero(sides == 2))
        found = np.compress(sides == 1, bits)  # twice as fast as an index
        at_low = int(np.count_nonzero(found == self.low))
        at_high = int(np.count_nonzero(found == self.high)) if self.high != self.low else 0
        self._edges.append((at_low, at_high))
        if at_low or at_high:  # many equal values are one number
            found = found[(found > self.low) & (found < self.high)]
        if found.size > max(bits.size >> 3, 1 << 12):  # not what a sample leaves: probably few values
            self._hold(*np.unique(found, return_counts=True))
        else:
            self._hold(found, None)

    def _hold(self, values: np.ndarray, counts: np.ndarray | None) -> None:
        self._held += len(values)
        if self._held > HELD:
            self._inside, self._edges = [], []
        else:
            self._inside.append((values, counts))

    def join(self, other: "Tally") -> None:
        """What another thread noted of the same bracket."""
        self.above += other.above
        self.lengths += other.lengths
        self._edges += other._edges
        self._held += other._held - sum(len(values) for values, _ in other._inside)
        for values, counts in other._inside:
            self._hold(values, counts)

    @property
    def counted(self) -> int:
        """How many elements reach the bracket's lower edge."""
        inside = sum(len(v) if c is None else int(c.sum()) for v, c in self._inside)
        return self.above + inside + sum(low + high for low, high in self._edges)

    def find(self, wanted: int) -> Found | None:
        """The `wanted`-th largest of all elements (from 1); None: it is not in the bracket, or there was too
        much in it."""
        if self._held > HELD:
            return None
        low, high = (sum(edge[i] for edge in self._edges) for i in (0, 1))
        if not self.above < wanted <= self.counted:
            return None
        wanted -= self.above
        if wanted <= high:
            return Found(self.high, wanted, high)
        wanted -= high
        inside = self.counted - self.above - low - high
        if wanted > inside:
            return Found(self.low, wanted - inside, low)
        values = np.concatenate([v for v, _ in self._inside])
        if all(counts is None for _, counts in self._inside):
            threshold = _largest(values, wanted)
            greater, equal = np.count_nonzero(values > threshold), np.count_nonzero(values == threshold)
            return Found(int(threshold), wanted - int(greater), int(equal))
        counts = np.concatenate([np.ones(len(v), np.int64) if c is None else c for v, c in self._inside])
        order = np.argsort(values)[::-1]
        reach = np.cumsum(counts[order])
        threshold = values[order][int(np.searchsorted(reach, wanted))]
        greater, equal = counts[values > threshold].sum(), counts[values == threshold].sum()
        return Found(int(threshold), wanted - int(greater), int(equal))

    def ties(self, chunk: int, value: int) -> int:
        """How many elements of a chunk equal a value in the bracket."""
        at_low, at_high = self._edges[chunk]
        if value == self.low:
            return at_low
        if value == self.high:
            return at_high
        values, counts = self._inside[chunk]
        return int((values == value).sum() if counts is None else counts[values == value].sum())


def _largest(values: Bits, wanted: int) -> int:
    """The `wanted`-th largest of some values: by counting, since equal ones are many."""
    low, high = int(values.min()), int(values.max())
    while True:
        shift = max(0, (high - low).bit_length() - 12)
        reach = np.cumsum(np.bincount((values - np.uint32(low)) >> shift)[::-1])
        step = int(np.searchsorted(reach, wanted))
        low += (len(reach) - 1 - step) << shift
        if not shift:
            return low
        wanted -= int(reach[step - 1]) if step else 0
        high = low + (1 << shift) - 1
        values = values[(values >= low) & (values <= high)]


def bracket(sample: UInt32[np.ndarray, "runs n"], share: float) -> tuple[int, int]:
    """Between which values that element of a population lies which a share of them reaches, six standard
    deviations to both sides, from runs evenly spaced over it. Elements of a run may be alike; how much runs
    differ is told by neighbours.
    """
    ordered, count = np.sort(sample, axis=None), sample.size
    center = ordered[min(int((1.0 - share) * count), count - 1)]
    reach = np.mean(sample >= center, axis=1)
    between = np.sqrt(np.mean(np.square(np.diff(reach))) / 2.0 / len(sample)) if len(sample) > 1 else 0.0
    deviation = max(np.sqrt(share * (1.0 - share) / count), float(between))
    half = 6.0 * deviation + 2.0 / count
    low, high = int((1.0 - share - half) * count), int(np.ceil((1.0 - share + half) * count))
    return (int(ordered[low]) if low > 0 else 0), (int(ordered[high]) if high < count else LAST)


def select(
    brackets: Sequence[tuple[int, int]],
    wanted: Sequence[int],
    of: Sequence[int],
    tally: Callable[[Sequence[tuple[int, int]]], list[Tally]],
    histogram: Callable[[Sequence[int]], list[np.ndarray]],
) -> tuple[list[Found | None], list[Tally]]:
    """What each request finds, none where it wants no element, and the tallies that it was found in.

    Args:
      brackets: where each request begins to look.
      wanted: how many elements each wants, of all.
      of: which score each is about.
      tally: a pass: what there is in brackets.
      histogram: a pass: how often the bits >> 15 of some scores have each of 2^16 values.
    """
    tallies = tally(brackets)
    found = [t.find(count) for t, count in zip(tallies, wanted, strict=True)]
    missed = [i for i, one in enumerate(found) if one is None and wanted[i] > 0]
    if missed:
        scores = sorted({of[i] for i in missed})
        reach = {s: np.cumsum(h[::-1])[::-1] for s, h in zip(scores, histogram(scores), strict=True)}
        again = list(brackets)
        for i in missed:
            high = max(int((reach[of[i]] >= wanted[i]).sum()) - 1, 0)
            again[i] = high << 15, high << 15 | 0x7FFF
        tallies = tally(again)
        found = [t.find(count) for t, count in zip(tallies, wanted, strict=True)]
    return found, tallies


def first_index(found: Found, tally: Tally, chunk: Callable[[int, int], Bits]) -> int:
    """The index behind the last element that is kept of those equal to the threshold.

    Args:
      chunk: (start, elements) -> the bits of a chunk that was tallied, read again.
    """
    if found.ties == found.all_ties:
        return sum(tally.lengths)
    left, start = found.ties, 0
    for i, length in enumerate(tally.lengths):
        here = tally.ties(i, found.threshold)
        if left <= here:
            return start + int(np.flatnonzero(chunk(start, length) == found.threshold)[left - 1]) + 1
        left, start = left - here, start + length
    raise AssertionError(f"{found} is not in the chunks")


def cut_of(bits: Bits, wanted: int) -> Cut:
    """The cut of a whole tensor whose bits are at hand."""
    if wanted == 0:
        return NOTHING
    threshold = _largest(bits, wanted)
    ties = wanted - int(np.count_nonzero(bits > threshold))
    return Cut.at(threshold, int(np.flatnonzero(bits == threshold)[ties - 1]) + 1)
