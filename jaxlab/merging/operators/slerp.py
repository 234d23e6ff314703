"""SLERP: a point on the great circle between two tensors."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.errors import UserError
from jaxlab.merging.numerics import F32, Mode, divide, dot, multiply, norm, round_to, total
from jaxlab.merging.operators.declarations import Scalar, Vectors, Weights
from jaxlab.merging.operators.registry import operator


class Arc(NamedTuple):
    """Two tensors and the angle between them, taken as vectors."""

    start: Float[Array, "*shape"]
    end: Float[Array, "*shape"]
    radians: Float[Array, ""]
    straight: Bool[Array, ""]
    """Taken as a straight line."""


def arc_between(models: Vectors, *, base: Float[Array, "*shape"] | None = None, mode: Mode) -> Arc:
    """From the first of two tensors to the second, or from the base to the only one.

    paper: the angle by an arctangent that is exact for small ones too; straight where there is no one arc:
    parallel or opposed within 1e-6, or a tensor of zeros. mergekit: by the arccosine of the dot product;
    straight beyond |cos| .9995; a tensor of norm up to 1e-8 is not normalised, which leaves about a right
    angle.

    Raises:
      UserError: not two tensors.
    """
    models = list(models) if base is None else [base, *models]
    if len(models) != 2:
        raise UserError(
            f"slerp merges two tensors, or a base and one; found {len(models)}, the base included"
        )
    a, b = models
    norm_a, norm_b = norm(a), norm(b)
    if mode == "mergekit":
        unit_a, unit_b = (divide(x, jnp.where(n > 1e-8, n, 1.0), F32) for x, n in ((a, norm_a), (b, norm_b)))
        cosine = jnp.clip(round_to(dot(unit_a, unit_b), F32), -1.0, 1.0)
        return Arc(a, b, round_to(jnp.arccos(cosine), F32), jnp.abs(cosine) > 0.9995)
    unit_a, unit_b = (divide(x, jnp.where(n == 0, 1.0, n), F32) for x, n in ((a, norm_a), (b, norm_b)))
    radians = round_to(2.0 * jnp.arctan2(norm(unit_a - unit_b), norm(unit_a + unit_b)), F32)
    return Arc(a, b, radians, (norm_a == 0) | (norm_b == 0) | (jnp.sin(radians) < 1e-6))


def along_the_arc(arc: Arc, weights: Weights) -> Float[Array, "*shape"]:
    """t = lambda_e / (lambda_v + lambda_e), lambda_v + lambda_e times as far out."""
    reach = total(list(weights), F32)
    t = jnp.where(reach == 0, 0.0, weights[1] / jnp.where(reach == 0, 1.0, reach))
    return multiply(slerp(arc, t=round_to(t, F32)), reach, F32)


@operator("Shoemake 1985", prepare=arc_between, inject=along_the_arc, scope="tensor", in_float32=True)
def slerp(arc: Arc, *, t: Scalar) -> Float[Array, "*shape"]:
    """(sin((1 - t) angle) a + sin(t angle) b) / sin(angle): fraction t of the way from a (0) to b (1), both
    ends exact (Shoemake 1985, sec. 3.3).
    """
    t = jnp.asarray(t)
    rest = round_to(1.0 - t, F32)
    sine = jnp.where(arc.straight, 1.0, jnp.sin(arc.radians))
    curves = [divide(jnp.sin(multiply(arc.radians, part, F32)), sine, F32) for part in (rest, t)]
    weights = [jnp.where(arc.straight, line, curve) for line, curve in zip((rest, t), curves, strict=True)]
    return total([multiply(arc.start, weights[0], F32), multiply(arc.end, weights[1], F32)], F32)
