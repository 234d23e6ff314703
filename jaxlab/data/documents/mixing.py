"""Which row of which data set comes when: exact shares, shuffled anew in each pass, any place by itself."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm

import numpy as np

LISTED = 1 << 20
"""Rows up to which a pass is shuffled as a list: `grain`'s shuffle, which works out any place by itself,
takes milliseconds for a place among few."""


class TrainingOrder:
    """Endless rows of several data sets, in the shares of their weights."""

    def __init__(self, seed: int, rows: Mapping[str, int], weights: Sequence[float]) -> None:
        """
        Args:
          rows: of each data set, by name, from 1 to 2^32 - 1.
        """
        self.seed = seed
        self._shares = exact_shares(weights)
        self._rows = tuple(rows.values())
        names = (hashlib.sha256(f"{seed} {name}".encode()).digest() for name in rows)
        self._seeds = tuple(int.from_bytes(name[:4], "little") for name in names)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(data set, row of it) at a place."""
        number, index = nth_of_mixture(index, self._shares)
        rows = self._rows[number]
        again, index = divmod(index, rows)
        return number, shuffled(index, rows, self._seeds[number], again)


def shuffled(index: int, rows: int, seed: int, again: int) -> int:
    """The row at a place of the pass number `again` over `rows` rows."""
    if rows <= LISTED:
        return int(_permutation(rows, seed, again)[index])
    from grain.experimental import index_shuffle

    return int(index_shuffle(index, max_index=rows - 1, seed=(seed + again) % (1 << 32), rounds=4))


@functools.lru_cache(maxsize=64)
def _permutation(rows: int, seed: int, again: int) -> np.ndarray:
    return np.random.default_rng((seed, again)).permutation(rows).astype(np.uint32)


def exact_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the ratios of weights as they are written: .7 and .3 are 7 and 3."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    unit = lcm(*(share.denominator for share in exact))
    return tuple(int(share * unit) for share in exact)


def nth_of_mixture(index: int, shares: Sequence[int]) -> tuple[int, int]:
    """(set, row of it) at a place of a mixture: of the first n places each set has its share of n, to within
    one for each set. Of the places that no earlier set has taken, each one takes its share, rounded up."""
    before, after, left = index, index + 1, sum(shares)
    for number, share in enumerate(shares):
        rest = left - share
        others, others_after = before * rest // left, after * rest // left
        if others == others_after:
            return number, before - others
        before, after, left = others, others_after, rest
    raise ValueError(f"shares must be positive, are {shares}")
