"""The merge operators, one file for each family of methods; importing this registers them all."""

from jaxlab.merging.operators import averaging, dare, slerp, ties
from jaxlab.merging.operators.registry import OPERATORS, Operator, operator, operator_named

__all__ = ["OPERATORS", "Operator", "averaging", "dare", "operator", "operator_named", "slerp", "ties"]
