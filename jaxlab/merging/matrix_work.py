"""How long operators take that decompose or multiply matrices, by their arithmetic."""

import math
from collections.abc import Mapping
from typing import Any

from jaxlab.merging.operators import operator_named

_SVD, _PRODUCT = 2.8e-9, 2.4e-11
"""Processor seconds on a CPU: of singular values for each of m n (m + n) / 2, of a product of m x n and n x n
for each of m n n. The least of several runs of 256 x 768 to 768 x 768; beside other work, waiting
threads of OpenBLAS make it several times as much.
"""
_DECOMPOSITIONS = {
    "tsv_m": 4.0,
    "iso_c": 1.0,
    "iso_cts": 5.0,
    "optmerge": 2.0,
    "svc": 1.3,
    "subspace_boosting": 1.0,
    "regmean": 0.3,
    "regmean_plusplus": 0.3,
}
"""Of two task vectors, in singular value decompositions of one."""


def matrix_seconds(operator: str, parameters: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """About how many processor seconds an operator of scope "matrix" computes for a tensor; none for what is
    no matrix."""
    if len(shape) != 2 or math.prod(shape) == 0:
        return 0.0
    m, n = shape
    count = sum(_DECOMPOSITIONS.get(name, 0.0) for name in operator.split("+"))
    steps = operator_named(operator).parameters.get("steps")
    products: float = 0 if steps is None else parameters.get("steps", steps.default)
    return count * _SVD * m * n * (m + n) / 2 + products * _PRODUCT * m * n * n
