"""Packing: every token once, documents whole where a row holds them, little padding; exact mixtures."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data.documents import packing
from jaxlab.data.documents.mixing import LISTED, TrainingOrder, exact_shares, nth_of_mixture, shuffled
from jaxlab.data.documents.packing import Pieces, fill_rate, pack

SIZES = st.lists(st.integers(1, 70), max_size=60)


def rows_of(pieces: Pieces) -> list[list[tuple[int, int]]]:
    """(start, length) of what each row holds."""
    flat = list(zip(pieces.start.tolist(), pieces.length.tolist(), strict=True))
    ends = [0, *pieces.row_ends.tolist()]
    return [flat[a:b] for a, b in pairwise(ends)]


def check(sizes, length, how):
    ends = np.cumsum(np.asarray(sizes, np.int64))
    pieces = pack(ends, length, how=how)
    rows = rows_of(pieces)
    covered = sorted((start, start + size) for row in rows for start, size in row)
    assert [a for a, _ in covered] == [0, *[b for _, b in covered]][: len(covered)]  # no gap, no overlap
    assert (covered[-1][1] if covered else 0) == sum(sizes)
    assert all(row and sum(size for _, size in row) <= length for row in rows)
    # No piece crosses a document, so no target does.
    starts = ends - np.asarray(sizes, np.int64)
    for row in rows:
        for start, size in row:
            document = np.searchsorted(ends, start, side="right")
            assert starts[document] <= start
            assert start + size <= ends[document]
    return rows, pieces


@given(SIZES, st.integers(2, 40))
@settings(max_examples=150, deadline=None)
def test_best_fit(sizes, length):
    rows, _ = check(sizes, length, "best_fit")
    whole = {(sum(sizes[:i]), size) for i, size in enumerate(sizes) if size <= length}
    assert whole <= {piece for row in rows for piece in row}  # short documents are not cut
    # Any two rows hold more than one row's worth: the next piece would have gone into the other one.
    filled = sorted(sum(size for _, size in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > length


@given(SIZES, st.integers(2, 40))
@settings(max_examples=150, deadline=None)
def test_concatenate(sizes, length):
    rows, _ = check(sizes, length, "concatenate")
    for row in rows[:-1]:
        assert sum(size for _, size in row) == length
    flat = [start for row in rows for start, _ in row]
    assert flat == sorted(flat)


def test_best_fit_chooses_the_fullest_row_that_holds_a_piece():
    # By decreasing length 7, 6, 4, 3: the 4 goes beside the 6, the 3 beside the 7.
    rows, pieces = check([3, 6, 7, 4], 10, "best_fit")
    assert sorted(sorted(size for _, size in row) for row in rows) == [[3, 7], [4, 6]]
    assert fill_rate(pieces, 10) == 1.0


def test_windows_are_packed_one_after_the_other(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 3)
    rows, _ = check([5, 5, 9, 1, 5, 4], 10, "best_fit")
    assert [sorted(size for _, size in row) for row in rows] == [[9], [5, 5], [1, 4, 5]]  # 9 and 1 apart


def test_lengths_as_of_a_corpus_leave_little_padding():
    sizes = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(np.int64) + 1
    pieces = pack(np.cumsum(sizes), 2048)
    assert fill_rate(pieces, 2048) > 0.998


@given(st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.7, 1.0, 3.0, 1e-3]), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_mixture_has_exact_shares(weights):
    shares = exact_shares(weights)
    assert [share / sum(shares) for share in shares] == pytest.approx(
        [w / sum(weights) for w in weights], rel=1e-12
    )
    counts = np.zeros(len(weights), np.int64)
    for place in range(300):
        number, index = nth_of_mixture(place, shares)
        assert index == counts[number]  # its rows one after the other, none left out
        counts[number] += 1
        expected = np.asarray(shares) / sum(shares) * (place + 1)
        assert (abs(counts - expected) < len(weights)).all()
    if sum(shares) <= 300:
        whole = 300 // sum(shares) * sum(shares)
        first = [nth_of_mixture(place, shares)[0] for place in range(whole)]
        assert np.bincount(first, minlength=len(weights)).tolist() == [
            share * (whole // sum(shares)) for share in shares
        ]


@pytest.mark.parametrize("rows", [1, 2, 13, LISTED + 7])
def test_each_pass_is_a_new_shuffle_of_all_rows(rows):
    places = range(rows) if rows < 100 else range(0, rows, 4099)
    first, second = ([shuffled(i, rows, 5, again) for i in places] for again in (0, 1))
    assert len(set(first)) == len(places)
    assert min(first) >= 0
    assert max(first) < rows
    if rows > 2:
        assert first != second
        assert first != [shuffled(i, rows, 6, 0) for i in places]


def test_the_order_of_training_goes_through_every_row_once_a_pass():
    order = TrainingOrder(3, {"a": 5, "b": 4}, [2.0, 1.0])
    seen = [order[i] for i in range(30)]
    of_a, of_b = ([row for number, row in seen if number == k] for k in (0, 1))
    assert (len(of_a), len(of_b)) == (20, 10)
    assert all(sorted(of_a[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert all(sorted(of_b[i : i + 4]) == list(range(4)) for i in (0, 4))
