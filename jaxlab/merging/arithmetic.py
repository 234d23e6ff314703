"""One rounding at a time: arithmetic whose bits do not depend on what the compiler fuses."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Mode = Literal["paper", "mergekit"]
"""paper: as published, in float32. mergekit: as mergekit 0.1.5 computes, its rounding included."""


def step(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """`x` as if it had been stored in `dtype` and read again, as float32.

    The barrier is what makes a merge reproducible: without it XLA joins a product and the sum that follows
    into one rounding, or not, depending on the program around them, and a model merged in a search would
    differ in its last bits from the same model merged alone. Division by a constant and pairs of casts stay
    what they say, too.
    """
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def working_dtype(mode: Mode, stored: jnp.dtype) -> jnp.dtype:
    """The dtype that holds intermediate results: float32, or in mode mergekit that of the tensors."""
    return jnp.dtype(stored) if mode == "mergekit" else jnp.dtype(jnp.float32)


def difference(
    x: Float[Array, "*shape"], base: Float[Array, "*shape"], dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """The task vector x - base of two tensors, float32 values rounded to `dtype`."""
    return step(x.astype(jnp.float32) - base.astype(jnp.float32), dtype)


def times(x: Float[Array, "*shape"], factor: Float[Array, ""], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """x * factor, rounded to `dtype`."""
    return step(x * factor, dtype)


def over(x: Float[Array, "*shape"], divisor: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """x / divisor, rounded to `dtype`; the divisor is a scalar or of x's shape."""
    return step(x / jax.lax.optimization_barrier(divisor), dtype)


def total(terms: list[Float[Array, "*shape"]], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The sum of the terms in their order: float32 throughout, rounded to `dtype` once."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return step(result, dtype)
