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
        (0.5, None, 0.9, OPEN),
    ],
)
def test_i4(label_first, label_last, random_first, status):
    assert rules.i4(0.95, label_first, label_last, random_first, 2).status == status


@pytest.mark.parametrize(("accuracy", "status"), [(0.75, SEEN), (0.74, OPEN), (None, OPEN)])
def test_flows_are_judged_of_a_model_that_learns_in_context(accuracy, status):
    verdict = rules.judged_if_able(rules.i2([0.1, 0.9]), accuracy, chance=0.5)
    assert verdict.status == status
    assert "halfway" in verdict.rule
    assert rules.judged_if_able(rules.i2([]), accuracy, 0.5) == rules.i2([])


def test_thirds():
    assert rules.thirds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.5, 5.5)
    assert rules.thirds([1.0, 3.0]) == (1.0, 3.0)
    assert rules.thirds([2.0]) == (2.0, 2.0)
