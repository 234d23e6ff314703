"""From what is known to findings in plain words, the worst first.

A rule speaks only where something is wrong or must be known; a healthy pair has no finding.
"""

from jaxlab.merging.diagnosis import model_rules, weight_rules
from jaxlab.merging.diagnosis.facts import SEVERITIES, Facts, Finding

_EXPLAIN = ("origin", "shuffled_layers", "permuted", "strange_layers")
"""Causes that change lengths and directions of task vectors as a whole,"""
_EXPLAINED = ("far", "lopsided", "opposed", "equal", "scaled")
"""and what is then no finding of its own."""


def judge(facts: Facts) -> list[Finding]:
    """All findings, the worst first."""
    rules = (*model_rules.RULES, *weight_rules.RULES)
    found = [finding for rule in rules for finding in rule(facts)]
    if any(f.cause in _EXPLAIN for f in found):
        found = [f for f in found if f.cause not in _EXPLAINED]
    return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), -f.weight))
