"""Thresholds over all tensors of a model, exact, from two rounds of counts that add up tensor by tensor; and
TIES trimmed by them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxlab.merging.numerics import Mode, kept_count, largest, magnitude_bits, multiply
from jaxlab.merging.operators.declarations import (
    Densities,
    Gather,
    Scalar,
    Thresholds,
    Vectors,
    Weights,
    per_model,
)
from jaxlab.merging.operators.registry import operator
from jaxlab.merging.operators.ties import elected_sum


def threshold_gather(
    scores: Callable[..., Sequence[Float[Array, "*shape"]]],
    kept: Callable[[Mapping[str, Any], int], Sequence[int]],
) -> Gather:
    """Gathers for each of several scores the greatest value whose magnitude so many elements of all tensors
    reach: totals["threshold"], uint32 bits of float32.

    Args:
      scores: (task_vectors, **named) -> the scores.
      kept: (parameters, elements of all tensors) -> how many shall reach the threshold, for each score.
    """

    def measure(task_vectors: Vectors, *, statistics: Any = None, totals: Any = None) -> Any:
        named = {} if statistics is None else {"statistics": statistics}
        bits = [magnitude_bits(x).reshape(-1) for x in scores(task_vectors, **named)]
        if totals is None:
            return {"counts": jnp.stack([_counts(b >> 15, 1 << 16) for b in bits])}
        high = jnp.asarray(totals["high"])
        inner = [
            _counts(jnp.where(b >> 15 == high[i], b & 0x7FFF, 1 << 15), (1 << 15) + 1)
            for i, b in enumerate(bits)
        ]
        return {"counts": jnp.stack(inner)[:, :-1]}

    def conclude(sums: Any, before: Any, parameters: Mapping[str, Any]) -> Any:
        counts = np.asarray(sums["counts"], np.int64)
        if before is None:
            wanted = np.asarray(kept(parameters, int(counts[0].sum())), np.int64)
        else:
            wanted = np.asarray(before["wanted"], np.int64)
        reach = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
        found = np.maximum((reach >= wanted[:, None]).sum(axis=1) - 1, 0)
        if before is None:
            above = np.take_along_axis(reach - counts, found[:, None], axis=1)[:, 0]
            return {"high": found.astype(np.uint32), "wanted": wanted - above}
        nothing = wanted <= 0
        threshold = (np.asarray(before["high"]).astype(np.uint32) << 15) | found.astype(np.uint32)
        return {"threshold": np.where(nothing, np.uint32(0xFFFFFFFF), threshold).astype(np.uint32)}

    return Gather(2, measure, conclude, Thresholds(scores, kept))


def _counts(values: UInt32[Array, " n"], length: int) -> UInt32[Array, " {length}"]:
    return jnp.zeros(length, jnp.uint32).at[values].add(jnp.uint32(1), mode="promise_in_bounds")


def _kept(parameters: Mapping[str, Any], size: int) -> list[int]:
    return [int(kept_count(float(d), size)) for d in parameters["density"]]


def trim_globally(
    task_vectors: Vectors, *, density: Densities = 1.0, totals: Any = None
) -> list[Float[Array, "*shape"]]:
    """Of each model the largest elements of all its task vectors stay, as many as its density says, and what
    equals the least of them; the others become zero (arXiv 2306.01708, sec. 3, step 1).
    """
    densities = per_model("density", density, len(task_vectors))
    result = []
    for i, (x, d) in enumerate(zip(task_vectors, densities, strict=True)):
        if totals is None:
            mask = largest(x, kept_count(d, x.size))
            least = jnp.min(
                jnp.where(mask, magnitude_bits(x), jnp.uint32(0xFFFFFFFF)), initial=jnp.uint32(0xFFFFFFFF)
            )
        else:
            least = jnp.asarray(totals["threshold"])[i]
        result.append(jnp.where(magnitude_bits(x) >= least, x, 0.0))
    return result


@operator(
    "Yadav et al. 2023, arXiv 2306.01708, trimmed globally",
    prepare=trim_globally,
    scope="model",
    gather=threshold_gather(lambda task_vectors: task_vectors, _kept),
)
def ties_global(
    trimmed: Vectors,
    weights: Weights,
    *,
    normalize: bool = True,
    lambda_: Scalar = 1.0,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """TIES whose threshold is one for all tensors of a model, as in its paper; see `ties`. Alone a tensor is
    the whole model.
    """
    return multiply(
        elected_sum(trimmed, weights, normalize=normalize, mode=mode, dtype=dtype), lambda_, dtype
    )
