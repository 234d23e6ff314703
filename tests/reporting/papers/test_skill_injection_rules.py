"""The rules of Skill Injection: seen, not seen, not examined, on both sides of thresholds."""

import pytest

from jaxlab.reporting.papers.skill_injection import rules
from jaxlab.reporting.papers.skill_injection.rules import Transfer

SEEN, NOT_SEEN, OPEN = "seen", "not seen", "not examined"


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
    assert rules.transfers(rules.M2, given).status == arrives
    assert rules.transfers(rules.M3, given, expected=False).status == stays_away


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


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (transfer(injected=0.49, donor=0.5), None),
        (transfer(injected=0.19, donor=0.3), None),  # no skill to transfer: nothing is near
        (transfer(alone=0.5, injected=0.74, donor=1.0), "4.0 points above"),
        (transfer(injected=0.49), "1.0 points below"),
        (transfer(injected=0.56), None),
    ],
)
def test_a_verdict_near_the_threshold_is_called_borderline(given, words):
    evidence = rules.transfers(rules.M3, given, expected=False).evidence
    assert ("Borderline" in evidence) == (words is not None)
    assert words is None or words in evidence


def test_the_distance_is_said_of_m4():
    scores = {"task_arithmetic": 0.8, "dare_linear": 0.695, "ties": 0.7}
    verdict = rules.m4(scores, dict.fromkeys(scores, 24))
    assert verdict.evidence.endswith(
        "The lesser of task arithmetic and dare_linear lies 0.5 points below ties."
    )
