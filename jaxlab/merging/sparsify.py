"""What thins a task vector out before it is combined: trimming (TIES) and random dropping (DARE)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import UserError
from jaxlab.merging.arithmetic import Mode, over, step, times
from jaxlab.merging.randomness import MAX_ELEMENTS


class Share(NamedTuple):
    """A density as traced numbers that are exact: one program then serves every density."""

    value: Float[Array, ""]
    kept: Int[Array, ""]
    """`kept_count` of the tensor in question."""


Density = float | Float[Array, ""] | Share


def kept_count(density: Density, size: int) -> int | Int[Array, ""]:
    """How many of `size` elements a density keeps: rounded down, but at least one unless the density is 0.

    Exact for a Python number. A traced density is a float32, and the count may be one off where density *
    size is nearly a whole number.
    """
    if isinstance(density, Share):
        return density.kept
    if isinstance(density, float | int):
        check_density(density)
        return min(max(int(density * size), 1), size) if density > 0 else 0
    count = jnp.floor(density * jnp.float32(size)).astype(jnp.int32)
    return jnp.where(density > 0, jnp.clip(count, min(1, size), size), 0)


def share_of(density: Density) -> Float[Array, ""]:
    """The density as float32."""
    value = density.value if isinstance(density, Share) else density
    check_density(value)
    return jnp.asarray(value, jnp.float32)


def check_density(density: Density) -> None:
    """Raises UserError for a known density outside 0 ... 1."""
    if isinstance(density, float | int) and not 0 <= density <= 1:
        raise UserError(f"density must be between 0 and 1, is {density}")


@jax.jit
def largest(x: Float[Array, "*shape"], count: int | Int[Array, ""]) -> Bool[Array, "*shape"]:
    """The `count` elements of largest magnitude, exactly so many; among equals those of lowest row-major
    index.

    NaN counts as larger than infinity. Two bisections on integers, each step one count over the tensor:
    exact, without a sort, and under sharding each step is one small all-reduce.
    """
    if x.size > MAX_ELEMENTS:
        raise UserError(f"a tensor of {x.size} elements has more than the {MAX_ELEMENTS} that can be counted")
    # The bits of non-negative floats are ordered as the floats are.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    bits = bits.astype(jnp.int32).reshape(-1)
    count = jnp.asarray(count, jnp.int32)
    # Threshold: the greatest value that at least `count` elements reach.
    threshold = _greatest(31, lambda value: _count(bits >= value) >= count)
    above, equal = bits > threshold, bits == threshold
    # Of the equal ones, those before the greatest index that does not take too many.
    index = jnp.arange(bits.size, dtype=jnp.int32)
    room = count - _count(above)
    end = _greatest(max(bits.size, 1).bit_length(), lambda value: _count(equal & (index < value)) <= room)
    return (above | (equal & (index < end))).reshape(x.shape)


def _count(mask: Bool[Array, " n"]) -> Int[Array, ""]:
    return jnp.sum(mask, dtype=jnp.int32)


def _greatest(bits: int, holds: Callable[[Int[Array, ""]], Bool[Array, ""]]) -> Int[Array, ""]:
    """The greatest integer of so many bits for which `holds`, which is true from 0 up to some value."""

    def set_bit(place: Int[Array, ""], value: Int[Array, ""]) -> Int[Array, ""]:
        candidate = value | (jnp.int32(1) << (jnp.int32(bits - 1) - place))
        return jnp.where(holds(candidate), candidate, value)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(bits), set_bit, jnp.int32(0))


def trim(deltas: list[Float[Array, "*shape"]], densities: Sequence[Density]) -> list[Float[Array, "*shape"]]:
    """TIES' first step (arXiv 2306.01708): of each task vector the largest elements stay, as many as its
    density says (`kept_count`), and the others become zero.
    """
    counts = [jnp.asarray(kept_count(d, x.size), jnp.int32) for x, d in zip(deltas, densities, strict=True)]
    kept = jax.vmap(largest)(jnp.stack(deltas), jnp.stack(counts))
    return [jnp.where(mask, delta, 0.0) for mask, delta in zip(kept, deltas, strict=True)]


def drop(
    delta: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    density: Density,
    *,
    rescale: bool,
    mode: Mode,
    dtype: jnp.dtype,
) -> Float[Array, "*shape"]:
    """DARE (arXiv 2311.03099): zeroes what the random mask drops and rescales what stays by 1 / density.

    In mode mergekit the scale makes the L1 norm what it was before (`same_norm`).
    """
    kept = jnp.where(mask, delta, 0.0)
    if not rescale:
        return kept
    if mode == "mergekit":
        # Its random numbers have no float16 on a CPU, so that the rescaling after them happens in float32.
        inner = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
        return step(same_norm(kept, delta, inner), dtype)
    scale = over(jnp.float32(1.0), share_of(density), dtype)
    return times(kept, jnp.where(jnp.isinf(scale), 0.0, scale), dtype)


def same_norm(
    kept: Float[Array, "*shape"], whole: Float[Array, "*shape"], dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """`kept` scaled to the L1 norm of `whole`, as it is where nothing was kept."""
    before, after = (step(jnp.sum(jnp.abs(x)), dtype) for x in (whole, kept))
    scale = over(before, jnp.where(after == 0, 1.0, after), dtype)
    return times(kept, jnp.where(after == 0, 1.0, scale), dtype)


def as_masks(masks: list[np.ndarray | Array] | None, deltas: list[Array]) -> list[Array] | None:
    """Given masks as boolean arrays of the tensors' shape. Raises UserError where they do not fit."""
    if masks is None:
        return None
    shapes = [np.shape(mask) for mask in masks]
    if shapes != [delta.shape for delta in deltas]:
        raise UserError(f"mask needs one array per model, each of shape {deltas[0].shape}; found {shapes}")
    return [jnp.asarray(mask).astype(bool) for mask in masks]
