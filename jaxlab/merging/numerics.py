"""Arithmetic, selection and random masks whose bits depend on neither the compiler, the program around them
nor the number of devices.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxlab.errors import UserError

Mode = Literal["paper", "mergekit"]
"""paper: as published, in float32. mergekit: as mergekit 0.1.5 computes, its rounding included."""

MAX_ELEMENTS = 2**31 - 1


# One rounding at a time.


def round_to(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
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
    return round_to(x.astype(jnp.float32) - base.astype(jnp.float32), dtype)


def multiply(
    x: Float[Array, "*shape"], factor: float | Float[Array, ""], dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """x * factor, rounded to `dtype`."""
    return round_to(x * factor, dtype)


def divide(
    x: Float[Array, "*shape"], divisor: Float[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """x / divisor, rounded to `dtype`; the divisor is a scalar or of x's shape."""
    return round_to(x / jax.lax.optimization_barrier(divisor), dtype)


def total(terms: Sequence[Float[Array, "*shape"]], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The sum of the terms in their order: float32 throughout, rounded to `dtype` once."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return round_to(result, dtype)


def rescale_l1(
    kept: Float[Array, "*shape"], whole: Float[Array, "*shape"], dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """`kept` scaled to the L1 norm of `whole`, as it is where nothing was kept."""
    before, after = (round_to(jnp.sum(jnp.abs(x)), dtype) for x in (whole, kept))
    scale = divide(before, jnp.where(after == 0, 1.0, after), dtype)
    return multiply(kept, jnp.where(after == 0, 1.0, scale), dtype)


# A share of the elements.


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
        return min(max(int(density * size), 1), size) if density > 0 else 0
    count = jnp.floor(density * jnp.float32(size)).astype(jnp.int32)
    return jnp.where(density > 0, jnp.clip(count, min(1, size), size), 0)


def share_of(density: Density) -> Float[Array, ""]:
    """The density as float32."""
    value = density.value if isinstance(density, Share) else density
    return jnp.asarray(value, jnp.float32)


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


# Random masks. An element's bits are a hash of (seed, tensor name, which model, index of the element), with
# no state: the same on every device, in any order, in any chunks. Integer multiplications and shifts only,
# several times cheaper than threefry.


def tensor_key(seed: int, name: str) -> np.ndarray:
    """The key of a tensor, uint32[2]: the first eight bytes of the SHA-256 of seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u4").astype(np.uint32)


def key_words(key: Array | np.ndarray) -> UInt32[Array, "2"]:
    """Two words out of what `tensor_key`, `jax.random.key` or `jax.random.PRNGKey` gave."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = jnp.asarray(key)
    if words.dtype != jnp.uint32 or words.ndim != 1 or words.shape[0] < 2:
        raise UserError(
            f"a key is jaxlab.merging.tensor_key(seed, name) or a JAX key, not {words.dtype}{words.shape}"
        )
    return words[:2]


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    # A bijection in which every input bit moves every output bit (Wellons' "lowbias32" constants).
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def random_bits(
    key: UInt32[Array, "2"], size: int, *, stream: int | UInt32[Array, ""] = 0, offset: int = 0
) -> UInt32[Array, " {size}"]:
    """Bits of `size` elements of a tensor from `offset` on (row-major); `stream` tells models apart."""
    if offset + size > MAX_ELEMENTS:
        raise UserError(
            f"a tensor of {offset + size} elements has more than the {MAX_ELEMENTS} that a mask can count"
        )
    salt = (jnp.asarray(stream, jnp.uint32) + jnp.uint32(1)) * jnp.uint32(0x9E3779B9)
    first, second = _mix(key[0] + salt), _mix(key[1] ^ salt)
    index = jnp.arange(offset, offset + size, dtype=jnp.uint32)
    return _mix(_mix(index ^ first) + second)


def keep_mask(
    key: UInt32[Array, "2"],
    shape: tuple[int, ...],
    density: Float[Array, ""],
    *,
    stream: int | UInt32[Array, ""] = 0,
) -> Bool[Array, "..."]:
    """True with probability `density` (float32, may be traced), independently for each element."""
    bits = random_bits(key, int(np.prod(shape, dtype=np.int64)), stream=stream)
    # 24 bits are exact in float32: 0 <= uniform < 1, so density 0 keeps nothing and 1 everything.
    uniform = (bits >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-24)
    return (uniform < density).reshape(shape)
