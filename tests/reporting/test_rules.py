"""The rules on hand-made numbers: seen, not seen, and not examined, on both sides of every threshold."""

import pytest

from jaxlab.reporting import rules
from jaxlab.reporting.claims import CLAIMS
from jaxlab.reporting.rules import Transfer

SEEN, NOT_SEEN, OPEN = "seen", "not seen", "not examined"


@pytest.mark.parametrize(
    ("full", "nsa", "parameters", "data_equal", "status"),
    [
        ([2.0], [1.9], (1000, 1000), True, SEEN),
        ([2.0], [2.02], (1000, 1009), True, SEEN),
        ([2.0], [2.021], (1000, 1000), True, NOT_SEEN),
        ([2.0, 2.2], [2.3, 1.9], (1000, 1000), True, SEEN),  # means over seeds
        ([2.0], [1.9], (1000, 1011), True, OPEN),
        ([2.0], [1.9], (1000, 1000), False, OPEN),
        ([], [1.9], (1, 1), True, OPEN),
        ([2.0], [], (1, 1), True, OPEN),
    ],
)
def test_n1(full, nsa, parameters, data_equal, status):
    verdict = rules.n1(full, nsa, parameters, data_equal)
    assert (verdict.claim.id, verdict.status) == ("N1", status)
    assert "1\u00a0%" in verdict.rule or not (full and nsa)


@pytest.mark.parametrize(
    ("found", "length", "status"),
    [([1.0, 0.95], 512, SEEN), ([1.0, 0.94], 512, NOT_SEEN), ([], 512, OPEN), ([1.0], None, OPEN)],
)
def test_n2(found, length, status):
    assert rules.n2(found, length).status == status


@pytest.mark.parametrize(
    ("nsa", "methods", "by_loss", "status"),
    [
        ([(100, 0.9)], {"Quest": [(109, 0.8)], "H2O": [(91, 0.89)]}, False, SEEN),
        ([(100, 0.9)], {"Quest": [(109, 0.9)]}, False, NOT_SEEN),  # not better
        ([(100, 0.9)], {"Quest": [(111, 0.95)], "H2O": [(100, 0.5)]}, False, SEEN),  # reads more
        ([(100, 0.9)], {"Quest": [(111, 0.5)]}, False, OPEN),
        ([(100, 0.9)], {"Quest": [(100, 0.95), (50, 0.5)]}, False, NOT_SEEN),  # only equal budgets count
        ([(100, 2.0)], {"Quest": [(100, 2.1)]}, True, SEEN),
        ([(100, 2.0)], {"Quest": [(100, 1.9)]}, True, NOT_SEEN),
        ([(100, 0.9), (100, 0.5)], {"Quest": [(100, 0.6), (100, 0.6)]}, False, SEEN),  # means over seeds
        ([], {"Quest": [(100, 0.6)]}, False, OPEN),
        ([(100, 0.9)], {}, False, OPEN),
    ],
)
def test_n4(nsa, methods, by_loss, status):
    assert rules.n4(nsa, methods, by_loss=by_loss).status == status


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ({"NSA": [1.0, 1.2], "min-max selector": [1.11], "auxiliary-loss selector": [1.2]}, SEEN),
        ({"NSA": [1.0], "min-max selector": [1.1], "auxiliary-loss selector": [1.0]}, NOT_SEEN),
        ({"NSA": [1.0]}, OPEN),
        ({"min-max selector": [1.1]}, OPEN),
        ({}, OPEN),
    ],
)
def test_n5(losses, status):
    assert rules.n5(losses).status == status


@pytest.mark.parametrize(
    ("full", "nsa", "status"), [([100.0], [101.0], SEEN), ([100.0], [100.0], NOT_SEEN), ([], [1.0], OPEN)]
)
def test_n3(full, nsa, status):
    assert rules.n3(full, nsa, 512, "cpu").status == status


def transfer(alone=0.0, injected=0.9, donor=1.0):
    return Transfer("french", alone, injected, donor, own=0.95, kept=0.9)


@pytest.mark.parametrize(
    ("given", "arrives", "stays_away"),
    [
        (transfer(), SEEN, NOT_SEEN),
        (transfer(injected=0.5), SEEN, NOT_SEEN),
        (transfer(injected=0.49), NOT_SEEN, SEEN),  # below half of the donor's
        (transfer(alone=0.55, injected=0.7), NOT_SEEN, SEEN),  # a gain of 15 points
        (transfer(injected=0.3, donor=0.5), SEEN, NOT_SEEN),
        (transfer(injected=0.4, donor=0.49), OPEN, OPEN),  # no skill to transfer
        (None, OPEN, OPEN),
    ],
)
def test_m1_m2_m3(given, arrives, stays_away):
    assert rules.transfers("M2", given).status == arrives
    assert rules.transfers("M3", given, expected=False).status == stays_away


@pytest.mark.parametrize(
    ("scores", "status"),
    [
        ({"task_arithmetic": 0.8, "dare_linear": 0.7, "ties": 0.6}, SEEN),
        (
            {"task_arithmetic": 0.8, "dare_linear": 0.5, "dare_ties": 0.7, "ties": 0.7},
            SEEN,
        ),  # its best variant
        ({"task_arithmetic": 0.8, "dare_linear": 0.695, "ties": 0.7}, SEEN),  # within a point
        ({"task_arithmetic": 0.8, "dare_linear": 0.6, "ties": 0.7}, NOT_SEEN),
        ({"task_arithmetic": 0.6, "dare_linear": 0.8, "ties": 0.7}, NOT_SEEN),
        ({"task_arithmetic": 0.2, "dare_linear": 0.2, "ties": 0.2}, SEEN),
        ({"task_arithmetic": 0.19, "dare_linear": 0.19, "ties": 0.19}, OPEN),  # nothing moved
        ({"task_arithmetic": 0.6, "ties": 0.7}, OPEN),
        ({"task_arithmetic": 0.6, "dare_linear": 0.7}, OPEN),
        ({}, OPEN),
    ],
)
def test_m4(scores, status):
    assert rules.m4(scores, dict.fromkeys(scores, 24)).status == status


def test_m4_needs_equal_numbers_of_evaluations():
    scores = {"task_arithmetic": 0.8, "dare_linear": 0.7, "ties": 0.6}
    assert rules.m4(scores, {"task_arithmetic": 48, "dare_linear": 24, "ties": 24}).status == OPEN


@pytest.mark.parametrize(
    ("grids", "status"),
    [
        ({"a": [0.0, 0.1, 0.9], "b": [0.0, 0.0, 0.2]}, SEEN),
        ({"a": [0.0, 0.1, 0.9], "b": [0.5, 0.5, 0.6]}, NOT_SEEN),  # one of two is not most
        ({"a": [0.8, 0.8, 0.9]}, NOT_SEEN),
        ({"a": [0.8]}, OPEN),
        ({}, OPEN),
    ],
)
def test_m5(grids, status):
    assert rules.m5(grids).status == status


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


def test_every_claim_of_the_papers_is_there():
    wanted = [f"{letter}{n}" for letter, most in (("N", 5), ("M", 5), ("I", 8)) for n in range(1, most + 1)]
    assert list(CLAIMS) == wanted
    assert all(CLAIMS[f"M{n}"].source == "abstract" for n in range(1, 6))
