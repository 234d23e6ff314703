"""The rules of Native Sparse Attention: seen, not seen, not examined, on both sides of thresholds."""

import pytest

from jaxlab.reporting.papers.nsa import rules
from jaxlab.reporting.papers.nsa.rules import AttentionTimes

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


def times(short, long, used=None):
    """Forward and forward_backward at two lengths, dense attention's time being 1: ratios of wall time, and
    of processor time where they differ from it."""
    given = {2048: (short, (used or (short, long))[0]), 8192: (long, (used or (short, long))[1])}
    return [
        AttentionTimes(length, part, 1.0, wall[i], 1.0, processor[i])
        for length, (wall, processor) in given.items()
        for i, part in enumerate(("forward", "forward_backward"))
    ]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (times((1.8, 1.9), (0.8, 0.7)), SEEN),
        (times((1.8, 1.9), (0.8, 1.0)), NOT_SEEN),  # not faster with the backward pass
        (times((1.8, 1.9), (1.1, 0.9)), NOT_SEEN),
        (times((0.7, 0.9), (0.8, 0.7)), NOT_SEEN),  # no gain with the length
        (times((1.8, 1.9), (0.8, 0.7), ((1.8, 1.9), (1.2, 0.7))), OPEN),  # wall and processor disagree
        (times((1.8, 1.9), (1.2, 0.7), ((1.8, 1.9), (0.8, 0.7))), OPEN),
        (times((1.8, 1.9), (0.8, 0.7))[2:], OPEN),  # one length
        (times((1.8, 1.9), (0.8, 0.7))[:3], OPEN),  # no backward pass at the greatest length
        (times((1.8, 1.9), (0.8, 0.7))[1:], OPEN),
        ([], OPEN),
    ],
)
def test_n3(given, status):
    assert rules.n3(given, "cpu").status == status


def test_n3_elsewhere_than_on_a_cpu_goes_by_wall_time():
    given = [t._replace(dense_used=None, nsa_used=None) for t in times((1.8, 1.9), (0.8, 0.7))]
    verdict = rules.n3(given, "a GPU", "Beside it.")
    assert verdict.status == SEEN
    assert "at 8\u202f192 tokens 0.80 (forward) and 0.70 (with backward)" in verdict.evidence
    assert "processor" not in verdict.evidence
    assert verdict.evidence.endswith("Beside it.")


@pytest.mark.parametrize(
    ("full", "nsa", "status"), [([100.0], [101.0], SEEN), ([100.0], [100.0], NOT_SEEN), ([], [1.0], OPEN)]
)
def test_n3_by_training_speed(full, nsa, status):
    assert rules.n3_training(full, nsa, 512, "cpu").status == status


@pytest.mark.parametrize(("sparse", "said"), [(2.01, True), (1.99, False), (2.03, False)])
def test_a_loss_above_within_the_tolerance_is_said_to_be_above(sparse, said):
    evidence = rules.n1([2.0], [sparse], (1000, 1000), True).evidence
    assert ("Above full attention's" in evidence) == said
    assert "one seed" in evidence
