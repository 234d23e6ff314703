"""Where tensors of a merge are cut, found in a pass over their streams before they are merged."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxlab.merging.numerics import Cut
from jaxlab.merging.programs import ZERO, Scores, score_part
from jaxlab.merging.selection import LAST, NOTHING, Tally, bracket, cut_of, first_index, select
from jaxlab.merging.steps import Step

CHUNK = 1 << 18
"""Elements whose scores are looked at at once."""
_RUNS, _RUN, _EVERY = 32, 1 << 12, 4
"""Of a tensor so many runs of so many elements are sampled, of these every fourth. Smaller ones are held
whole."""

Brackets = Sequence[tuple[int, int]]


def cuts_of(step: Step) -> tuple[Cut, ...]:
    """Where `largest` cuts the tensor, in the order in which its operator asks."""
    if step.size == 0:
        return ()
    if step.size <= _RUNS * _RUN:
        (arrays,) = step.parts(step.size)
        bits, wanted, of = _scores(step, arrays)
        return tuple(cut_of(bits[score], count) for score, count in zip(of, wanted, strict=True))
    runs, wanted, of = _sampled(step, _RUNS)
    brackets = [bracket(runs[score], count / step.size) for score, count in zip(of, wanted, strict=True)]
    found, tallies = select(
        brackets,
        wanted,
        of,
        lambda brackets: _tally(step, brackets, of),
        lambda scores: _histogram(step, scores),
    )
    result = []
    for one, tally, score in zip(found, tallies, of, strict=True):
        if one is None:
            result.append(NOTHING)
            continue
        chunk = lambda start, count, score=score: _bits(step, start, count)[score]
        result.append(Cut.at(one.threshold, first_index(one, tally, chunk)))
    return tuple(result)


def thresholds_of(
    steps: Sequence[Step],
    kept: Callable[[int], Sequence[int]],
    each: Callable[[Callable[[Step], None], Sequence[Step]], None],
) -> np.ndarray:
    """The thresholds of `Thresholds` over many tensors.

    Args:
      kept: how many elements shall reach each, of so many.
      each: calls a function for each item of a list, on threads.
    """
    steps = [step for step in steps if step.size]
    size = sum(step.size for step in steps)
    wanted = [min(count, size) for count in kept(size)]
    of, lock = range(len(wanted)), threading.Lock()

    def over_all(
        one: Callable[[Step], Any], add: Callable[[Any], None], steps: Sequence[Step] = steps
    ) -> None:
        def put(step: Step) -> None:
            result = one(step)
            with lock:
                add(result)

        each(put, steps)

    samples: dict[str, list[np.ndarray]] = {}
    enough = min(max(size >> 20, _RUNS), 64 * _RUNS)
    share = lambda step: min(max(1, round(enough * step.size / size)), step.size // _RUN)
    sampled = [step for step in steps if step.size >= _RUN]
    over_all(
        lambda step: (step.name, _sampled(step, share(step))[0]),
        lambda found: samples.update([found]),
        sampled,
    )
    brackets = [(0, LAST)] * len(wanted)
    if samples:
        ordered = [samples[step.name] for step in sampled]
        runs = [np.concatenate([sample[score] for sample in ordered]) for score in of]
        brackets = [bracket(run, count / size) for run, count in zip(runs, wanted, strict=True)]

    def tally(brackets: Brackets) -> list[Tally]:
        joined = [Tally(*own) for own in brackets]

        def join(found: list[Tally]) -> None:
            for mine, other in zip(joined, found, strict=True):
                mine.join(other)

        over_all(lambda step: _tally(step, brackets, of), join)
        return joined

    def histogram(scores: Sequence[int]) -> list[np.ndarray]:
        joined = [np.zeros(1 << 16, np.int64) for _ in scores]

        def join(found: list[np.ndarray]) -> None:
            for mine, other in zip(joined, found, strict=True):
                mine += other

        over_all(lambda step: _histogram(step, scores), join)
        return joined

    found, _ = select(brackets, wanted, of, tally, histogram)
    return np.array([0xFFFFFFFF if one is None else one.threshold for one in found], np.uint32)


def _each(
    step: Step, arrays: Sequence[np.ndarray], start: int, brackets: Brackets = ()
) -> Iterator[tuple[Scores, int]]:
    """The scores of a part, chunk by chunk, and how many elements each has."""
    given = np.zeros((4 * len(step.merging.sources) + 4, 2), np.uint32)  # more than there are requests
    given[: len(brackets)] = np.array(brackets, np.uint32).reshape(-1, 2)
    for chunk in step.chunks(arrays, start, CHUNK):
        found = score_part(step.program, *chunk.arguments, ZERO, np.uint32(step.size), given)
        yield found, chunk.elements


def _scores(step: Step, arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[int], list[int]]:
    """The bits of each score; of each request how many elements it wants, and of which score."""
    found = list(_each(step, arrays, 0))
    bits = [
        np.concatenate([np.asarray(scores.bits[i])[:count] for scores, count in found])
        for i in range(len(found[0][0].bits))
    ]
    first = found[0][0]
    return bits, [int(count) for count in first.counts], [int(of) for of in first.of]


def _bits(step: Step, start: int, count: int) -> list[np.ndarray]:
    (arrays,) = step.parts(count, start=start, stop=start + count)
    return _scores(step, arrays)[0]


def _sampled(step: Step, runs: int) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Of each score some elements, [runs, elements of a run]; and what `_scores` says of requests."""
    arrays = [
        step.reader.sample(source, step.size, runs, _RUN, step.merging.read_as)
        for source in step.merging.everything
    ]
    bits, wanted, of = _scores(step, arrays)
    return [one.reshape(runs, _RUN)[:, ::_EVERY] for one in bits], wanted, of


def _tally(step: Step, brackets: Brackets, of: Sequence[int]) -> list[Tally]:
    tallies, start = [Tally(*own) for own in brackets], 0
    for arrays in step.parts(CHUNK):
        for scores, count in _each(step, arrays, start, brackets):
            for tally, score, sides in zip(tallies, of, scores.sides, strict=True):
                tally.add(np.asarray(scores.bits[score])[:count], np.asarray(sides)[:count])
        start += len(arrays[0])
    return tallies


def _histogram(step: Step, scores: Sequence[int]) -> list[np.ndarray]:
    counts = [np.zeros(1 << 16, np.int64) for _ in scores]
    start = 0
    for arrays in step.parts(CHUNK):
        for found, count in _each(step, arrays, start):
            for own, score in zip(counts, scores, strict=True):
                own += np.bincount(np.asarray(found.bits[score])[:count] >> 15, minlength=1 << 16)
        start += len(arrays[0])
    return counts
