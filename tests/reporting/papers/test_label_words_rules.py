"""The rules of Label Words: seen, not seen, not examined, on both sides of thresholds."""

import pytest

from jaxlab.reporting.papers.label_words import rules

SEEN, NOT_SEEN, OPEN = "seen", "not seen", "not examined"


def test_shares():
    wp, pq, ww = [0.7, 0.5, 0.3, 0.0], [0.2, 0.4, 0.6, 0.9], [0.1, 0.1, 0.1, 0.1]
    assert [v.status for v in (rules.i1(wp), rules.i2(pq), rules.i3(wp, pq, ww))] == [SEEN] * 3
    # The other way round: words first feed the answer, then the label words.
    assert [v.status for v in (rules.i1(pq), rules.i2(wp))] == [NOT_SEEN] * 2
    # Large, but not larger than elsewhere; larger, but not large.
    assert rules.i1([0.5, 0.5, 0.5]).status == NOT_SEEN
    assert rules.i1([0.3, 0.2, 0.1]).status == NOT_SEEN
    assert [v.status for v in (rules.i1([]), rules.i2([]), rules.i3([], [], []))] == [OPEN] * 3


@pytest.mark.parametrize(
    ("ww", "status"),
    [
        ([0.1, 0.1, 0.9, 0.9], SEEN),  # 2 of 3; the last layer does not count
        ([0.1, 0.9, 0.9, 0.0], NOT_SEEN),
        ([0.4, 0.4, 0.4, 0.4], NOT_SEEN),  # as small as another one is not the smallest
    ],
)
def test_i3(ww, status):
    assert rules.i3([0.4] * 4, [0.6] * 4, ww).status == status


@pytest.mark.parametrize(
    ("label_first", "label_last", "random_first", "status"),
    [
        (0.5, 0.9, 0.9, SEEN),
        (0.5, 0.56, 0.56, SEEN),
        (0.5, 0.54, 0.9, NOT_SEEN),
        (0.5, 0.9, 0.54, NOT_SEEN),
    ],
)
def test_i4(label_first, label_last, random_first, status):
    loyalty = rules.Loyalty(label_first, label_last, random_first)
    plenty, none = rules.Loyalty(0.1, 0.9, 0.9), rules.Loyalty(0.9, 0.9, 0.9)
    assert rules.i4(loyalty, plenty, None, 2).status == status
    assert rules.i4(plenty, loyalty, None, 2).status == status
    # Accuracy never decides, as high or low as it may be; what is undefined does not either.
    assert rules.i4(loyalty, None, none, 2).status == status
    assert "label loyalty is undefined" in rules.i4(loyalty, None, none, 2).evidence
    assert rules.i4(None, plenty, plenty, 2).status == OPEN


def test_i5():
    rising, flat = [0.5, 0.7, 0.9], [0.7, 0.7, 0.7]
    assert rules.i5([rising, rising]).status == SEEN
    assert rules.i5([rising, flat]).status == NOT_SEEN
    assert rules.i5([[0.2, 0.3, 0.45]]).status == NOT_SEEN  # it rises, to less than chance
    assert rules.i5([rising, [None] * 3]).status == SEEN
    assert rules.i5([[None] * 3]).status == rules.i5([]).status == OPEN
    assert "undefined" in rules.i5([[None] * 3]).evidence


def test_i6():
    assert rules.i6([0.8, 0.9], {1: [0.6, 0.6], 5: [0.7, 0.8]}).status == SEEN
    assert rules.i6([0.8, 0.9], {1: [0.6, 0.6], 5: [0.9, 0.8]}).status == NOT_SEEN
    assert rules.i6([], {1: [0.6]}).status == rules.i6([0.8], {}).status == OPEN
    assert "Positive alone" in rules.i6([0.8], {1: [0.6]}, "Positive").evidence


def test_i7():
    def methods(label, word):
        of = lambda x, y: {"label_loyalty": x, "word_loyalty": y}
        others = {name: of(0.6, 0.3) for name in ("text_anchor", "hidden_random", "hidden_random_top")}
        return {"full": of(1.0, 1.0), "hidden_anchor": of(label, word), **others}

    assert rules.i7(methods(0.9, 0.8), 1.5, True).status == SEEN
    assert rules.i7(methods(0.9, 0.8), 0.9, True).status == NOT_SEEN  # no faster
    assert rules.i7(methods(0.5, 0.8), 1.5, True).status == NOT_SEEN
    assert rules.i7(methods(0.5, 0.8), 1.5, False).status == SEEN  # label loyalty is undefined
    assert rules.i7(methods(0.9, 0.2), 1.5, True).status == NOT_SEEN
    assert rules.i7({}, None, True).status == OPEN


def test_i8():
    assert rules.i8(0.6, 0.5, 4).status == SEEN
    assert rules.i8(0.4, 0.9, 4).status == NOT_SEEN
    assert "too few pairs" in rules.i8(None, None, 2).evidence
    assert "alike" in rules.i8(None, None, 4).evidence
    assert rules.i8(None, None, None).status == OPEN


def test_thirds():
    assert rules.thirds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.5, 5.5)
    assert rules.thirds([1.0, 3.0]) == (1.0, 3.0)
    assert rules.thirds([2.0]) == (2.0, 2.0)
