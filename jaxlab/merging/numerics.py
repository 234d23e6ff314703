"""Arithmetic and selection whose bits depend on neither the compiler, the program around them
nor the number of devices.
"""

import abc
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, UInt32

from jaxlab.errors import UserError

Mode = Literal["paper", "mergekit"]
"""paper: as published, in float32. mergekit: as mergekit 0.1.5 computes, its rounding included."""

F32 = jnp.dtype(jnp.float32)

Count = int | np.uint32 | Integer[Array, ""]
"""A number of elements."""

MAX_ELEMENTS = 2**32 - 2
"""Of one tensor, as far as 32 bits can count."""


# One rounding at a time.


def round_to(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """`x` as if it had been stored in `dtype` and read again, as float32.

    The barrier is what makes a merge reproducible: without it XLA joins a product and the sum that follows
    into one rounding, or not, depending on the program around them, and a model merged in a search would
    differ in its last bits from the same model merged alone. Division by a constant and pairs of casts stay
    what they say, too. Within `rounding_by` it does the same without a barrier.
    """
    zero = getattr(_rounding, "zero", None)
    if zero is None:
        return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)
    stored = x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(stored, jnp.uint16 if stored.dtype.itemsize == 2 else jnp.uint32)
    return jax.lax.bitcast_convert_type(bits | zero.astype(bits.dtype), stored.dtype).astype(jnp.float32)


_rounding = threading.local()


@contextlib.contextmanager
def rounding_by(zero: UInt32[Array, ""]) -> Iterator[None]:
    """Traces `round_to` so that all steps can be one loop over the elements, several times faster on a CPU
    than the arrays between barriers: each result passes through an or with `zero`, which the compiler cannot
    know to be zero. (An exclusive or would cancel out where one result is rounded twice.)

    Args:
      zero: 0, an argument of the program that is traced.
    """
    _rounding.zero = zero
    try:
        yield
    finally:
        _rounding.zero = None


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
    before, after = (round_to(tree_sum(x, of=jnp.abs), dtype) for x in (whole, kept))
    scale = divide(before, jnp.where(after == 0, 1.0, after), dtype)
    return multiply(kept, jnp.where(after == 0, 1.0, scale), dtype)


def exponential(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e to the power of float32 values, to 2 units in the last place, the same bits in every program. The
    compiler's own has other last bits in what is left of a loop than in its vectors, and so in tensors that
    are stacked than in each alone.

    e^x = 2^k e^r with the nearest integer k to x / ln 2, ln 2 in two parts (Cody and Waite); e^r by the
    polynomial of Cephes' expf.
    """
    high, low = 0.693359375, -2.12194440e-4
    bounded = jnp.clip(x, -104.0, 89.0)
    k = jnp.floor(round_to(round_to(bounded * 1.44269504088896341, F32) + 0.5, F32))
    r = round_to(bounded - round_to(k * high, F32), F32)
    r = round_to(r - round_to(k * low, F32), F32)
    y = jnp.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = round_to(round_to(y * r, F32) + c, F32)
    y = round_to(round_to(y * round_to(r * r, F32), F32) + r, F32)
    y = round_to(y + 1.0, F32)
    half = jnp.floor(k * 0.5)
    power = lambda n: jax.lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)
    return round_to(round_to(y * power(half), F32) * power(k - half), F32)


def hyperbolic_tangent(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """tanh of float32 values, to 2 units in the last place, the same bits in every program (`exponential`):
    by the polynomial of Cephes' tanhf below .625, else 1 - 2 / (e^2|x| + 1)."""
    z = round_to(x * x, F32)
    y = jnp.full_like(z, -5.70498872745e-3)
    for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        y = round_to(round_to(y * z, F32) + c, F32)
    small = round_to(x + round_to(round_to(y * z, F32) * x, F32), F32)
    size = jnp.abs(x)
    falling = round_to(2.0 / round_to(exponential(size + size) + 1.0, F32), F32)
    large = jnp.sign(x) * round_to(1.0 - falling, F32)
    return jnp.where(size < 0.625, small, large)


# Sums whose order is written down.


def tree_sum(
    *arrays: Float[Array, "*shape"], of: Callable[..., Float[Array, "*block"]] = lambda x: x
) -> Float[Array, ""]:
    """The sum of all elements, or of a function of the elements of several arrays, float32, by halves of
    halves: the same bits in every program, stacked, sharded, on a CPU or a GPU, which `jnp.sum` does not
    promise; and closer to the exact sum.
    """
    flat = [x.reshape(-1) for x in arrays]
    one = lambda blocks: fold_sum(jax.lax.optimization_barrier(of(*blocks)), 0)
    size = flat[0].size
    whole = size // _BLOCK
    if whole < 2:
        return one(flat)
    block = lambda i: one([jax.lax.dynamic_slice(x, (i * jnp.uint32(_BLOCK),), (_BLOCK,)) for x in flat])
    sums = jax.lax.map(block, _index(whole))
    if size % _BLOCK:
        sums = jnp.append(sums, one([x[whole * _BLOCK :] for x in flat]))
    return fold_sum(sums, 0)


_BLOCK = 1 << 15
"""Elements that a cache holds; the sums depend on it."""


def fold_sum(x: Float[Array, "*shape"], axis: int) -> Float[Array, "*rest"]:
    """`tree_sum` along one axis."""
    x = jnp.moveaxis(x.astype(jnp.float32), axis, 0)
    if x.shape[0] == 0:
        return jnp.zeros(x.shape[1:], jnp.float32)
    while (count := x.shape[0]) > 1:
        parts = min(8, count)
        whole, rest = divmod(count, parts)
        if rest > whole:  # only short ones
            x = jnp.concatenate([x, jnp.zeros((parts - rest, *x.shape[1:]), jnp.float32)])
            whole, rest = whole + 1, 0
        terms = [x[i * whole : (i + 1) * whole] for i in range(parts)]
        while len(terms) > 1:
            pairs = itertools.zip_longest(terms[::2], terms[1::2])
            terms = [a if b is None else a + b for a, b in pairs]
        (total,) = terms
        if rest:
            total = jnp.concatenate([total[:rest] + x[parts * whole :], total[rest:]])
        x = jax.lax.optimization_barrier(total)
    return x[0]


def dot(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The sum of all products, float32; see `tree_sum`."""
    return tree_sum(x, y, of=lambda a, b: a * b)


def norm(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The L2 norm of all elements, float32; see `tree_sum`."""
    return round_to(jnp.sqrt(tree_sum(x, of=lambda a: a * a)), F32)


# A share of the elements.


class Share(NamedTuple):
    """A share of a tensor's elements as exact traced numbers: one program then serves every share."""

    value: Float[Array, ""] | np.float32
    kept: Integer[Array, ""] | np.uint32
    """`kept_count` of the tensor in question."""
    whole: Integer[Array, ""] | np.uint32
    """`floor_count` of it."""

    @classmethod
    def of(cls, value: float, size: int) -> "Share":
        """Of a tensor of `size` elements."""
        counts = kept_count(value, size), floor_count(value, size)
        return cls(np.float32(value), *(np.uint32(count) for count in counts))


Density = float | Float[Array, ""] | Share


def kept_count(density: Density, size: Count) -> Count:
    """How many of `size` elements a density keeps: rounded down, but at least one unless the density is 0.

    Exact for a Python number. A traced density is a float32, and the count may be one off where density *
    size is nearly a whole number.
    """
    if isinstance(density, Share):
        return density.kept
    if isinstance(density, float | int):
        size = _known(size)
        return min(max(int(density * size), 1), size) if density > 0 else 0
    count = floor_count(density, size)
    least = jnp.minimum(as_count(size), jnp.uint32(1))
    return jnp.where(density > 0, jnp.maximum(as_count(count), least), jnp.uint32(0))


def floor_count(share: Density, size: Count) -> Count:
    """The whole number of elements in a share of `size`; exact as `kept_count` is."""
    if isinstance(share, Share):
        return share.whole
    if isinstance(share, float | int):
        size = _known(size)
        return min(int(share * size), size)
    return jnp.minimum(jnp.floor(share * jnp.float32(size)).astype(jnp.uint32), as_count(size))


def _known(size: Count) -> int:
    if not isinstance(size, int):
        raise TypeError("a share of a tensor that is merged in chunks is a Share, or a traced number")
    return size


def as_count(value: Count) -> UInt32[Array, ""]:
    """A number of elements as the uint32 that they are counted in."""
    return jnp.asarray(value, None if isinstance(value, jax.Array) else jnp.uint32).astype(jnp.uint32)


def share_of(density: Density) -> Float[Array, ""]:
    """The density as float32."""
    value = density.value if isinstance(density, Share) else density
    return jnp.asarray(value, jnp.float32)


def largest(x: Float[Array, "*shape"], count: Count) -> Bool[Array, "*shape"]:
    """The `count` elements of largest magnitude, exactly so many; among equals those of lowest row-major
    index.

    NaN counts as larger than infinity. Exact, by counting, without a sort; under sharding each step is one
    small all-reduce. Within `in_chunks` x is a chunk of a tensor, and the mask that of the whole tensor.
    """
    chunks = getattr(_chunks, "active", None)
    if chunks is not None:
        return chunks.largest(x, as_count(count))
    check_size(x.size)
    return _largest(x, as_count(count))


class Chunks(abc.ABC):
    """What is known of a tensor while its chunks are merged."""

    size: Integer[Array, ""]
    """Elements of the whole tensor."""

    @abc.abstractmethod
    def largest(self, x: Float[Array, "*shape"], count: UInt32[Array, ""]) -> Bool[Array, "*shape"]:
        """Which of x, a chunk, are among the `count` largest of the whole."""


_chunks = threading.local()


@contextlib.contextmanager
def in_chunks(chunks: Chunks) -> Iterator[None]:
    """Traces operators whose elements depend on the whole tensor by `largest` alone for a chunk of it."""
    _chunks.active = chunks
    try:
        yield
    finally:
        _chunks.active = None


def size_of(x: Float[Array, "*shape"]) -> Count:
    """How many elements the tensor has, also where x is a chunk of it (`in_chunks`)."""
    chunks = getattr(_chunks, "active", None)
    return x.size if chunks is None else chunks.size


class Cut(NamedTuple):
    """Where `largest` cuts a tensor: magnitudes above the threshold stay, and of those equal to it the ones
    of an index below."""

    threshold: UInt32[Array, ""] | np.uint32
    """`magnitude_bits`"""
    before: UInt32[Array, "2"] | UInt32[np.ndarray, "2"]
    """An index; two words, the lower first."""

    @classmethod
    def at(cls, threshold: int, index: int) -> "Cut":
        """Of two Python numbers."""
        return cls(np.uint32(threshold), np.array([index & 0xFFFFFFFF, index >> 32], np.uint32))

    def keeps(self, x: Float[Array, "*shape"], offset: UInt32[Array, "2"]) -> Bool[Array, "*shape"]:
        """Which elements of a chunk stay that begins at `offset`."""
        low = _index(x.size) + offset[0]
        high = offset[1] + (low < offset[0]).astype(jnp.uint32)
        first = (high < self.before[1]) | ((high == self.before[1]) & (low < self.before[0]))
        bits = magnitude_bits(x)
        return (bits > self.threshold) | ((bits == self.threshold) & first.reshape(x.shape))


@jax.jit
def _largest(x: Float[Array, "*shape"], count: UInt32[Array, ""]) -> Bool[Array, "*shape"]:
    magnitude = lambda: magnitude_bits(x)  # in its shape: flat, a sharded tensor would have to be gathered
    threshold, reached = _reached_by(magnitude, count, x.size, 1 << 31)
    # Of those equal to the threshold, the last ones may be too many.
    surplus = jnp.maximum(reached, count) - count
    place = lambda: jnp.where(magnitude() == threshold, _places(x.shape) + jnp.uint32(1), jnp.uint32(0))
    start, _ = _reached_by(place, surplus, x.size, x.size + 1)
    return (magnitude() >= threshold) & ~((surplus > 0) & (place() >= start))


def order_statistic(x: Float[Array, "*shape"], rank: int | Integer[Array, ""]) -> Float[Array, ""]:
    """The element of a tensor that has `rank` others before it in ascending order; exact. NaN comes last,
    and is what an empty tensor gives.
    """
    check_size(x.size)
    if x.size == 0:
        return jnp.float32(jnp.nan)
    sign, last = jnp.uint32(1 << 31), jnp.uint32(0xFFFFFFFF)

    def ordered() -> UInt32[Array, "*shape"]:
        # The greater the bits of a negative number, the less it is.
        bits = _float_bits(x)
        return jnp.where(jnp.isnan(x), last, jnp.where(bits >= sign, ~bits, bits | sign))

    count = jnp.uint32(x.size) - jnp.asarray(
        rank, None if isinstance(rank, jax.Array) else jnp.uint32
    ).astype(jnp.uint32)
    low, _ = _reached_by(ordered, count, x.size, 0xFFFFFFFF)
    found = jnp.min(jnp.where(ordered() >= low, ordered(), last))
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)


_MARKS = 7
"""At how many values one pass over a tensor counts: three bits of a threshold each."""
_SAMPLE = 1024


def _reached_by(
    values: Callable[[], UInt32[Array, "*shape"]], count: UInt32[Array, ""], size: int, ceiling: int
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """A value that `count` of the `size` values reach and how many do: exactly `count`, or if equal values
    allow no such number, the greatest value that more than so many reach. All values are below the ceiling.

    `values` is called within each pass, so that they are never written to memory. The first pass counts where
    a sample expects the value to be.
    """
    none = count == 0
    top = jnp.uint32(ceiling)
    steps = jnp.arange(1, _MARKS + 1, dtype=jnp.uint32)

    def marks_between(low: UInt32[Array, ""], high: UInt32[Array, ""]) -> UInt32[Array, " marks"]:
        width = jnp.maximum((high - low) // jnp.uint32(_MARKS + 1), jnp.uint32(1))
        return jnp.minimum(low + width * steps, high - 1)

    def undecided(state: Any) -> Bool[Array, ""]:
        low, reached, high, _ = state
        return (reached > count) & (high - low > 1)

    def narrow(state: Any) -> Any:
        low, reached, high, marks = state
        found, zero = values(), jnp.uint32(0)
        tests = tuple((found >= marks[i]).astype(jnp.uint32) for i in range(_MARKS))
        add = lambda x, y: tuple(p + q for p, q in zip(x, y, strict=True))
        counts = jnp.stack(jax.lax.reduce(tests, (zero,) * _MARKS, add, tuple(range(found.ndim))))
        enough = jnp.sum(counts >= count, dtype=jnp.int32)
        at = jnp.maximum(enough - 1, 0)
        low, reached = jnp.where(enough > 0, marks[at], low), jnp.where(enough > 0, counts[at], reached)
        high = jnp.where(enough < _MARKS, marks[jnp.minimum(enough, _MARKS - 1)], high)
        return low, reached, high, marks_between(low, high)

    low = jnp.where(none, top, jnp.uint32(0))
    if size < 8 * _SAMPLE:
        marks = marks_between(low, top)
    else:
        sample = jnp.sort(_sampled(values()))
        share = count.astype(jnp.float32) / jnp.float32(size)
        place = sample.size - jnp.floor(share * jnp.float32(sample.size)).astype(jnp.int32)
        spread = jnp.arange(-(_MARKS // 2), _MARKS // 2 + 1) * (_SAMPLE // 64)  # a standard deviation apart
        marks = sample[jnp.clip(place + spread, 0, sample.size - 1)]
        marks = jnp.clip(marks, jnp.uint32(1), top - 1)
    reached = jnp.where(none, jnp.uint32(0), jnp.uint32(size))
    low, reached, _, _ = jax.lax.while_loop(undecided, narrow, (low, reached, top, marks))
    return low, reached


def _sampled(values: UInt32[Array, "*shape"]) -> UInt32[Array, " sample"]:
    """About `_SAMPLE` of the values, evenly spaced along every axis."""
    steps, left = [], _SAMPLE
    for i, length in enumerate(values.shape):
        taken = min(length, max(1, round(left ** (1 / (values.ndim - i)))))
        steps.append(max(1, length // taken))
        left = max(1, left // -(-length // steps[-1]))
    return jax.lax.slice(values, [0] * values.ndim, values.shape, steps).reshape(-1)


def magnitude_bits(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The bits of |x| in float32, which are ordered as the magnitudes are; NaN beyond infinity."""
    return _float_bits(x) & jnp.uint32(0x7FFFFFFF)


def _float_bits(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _index(size: int) -> UInt32[Array, " n"]:
    return jax.lax.iota(jnp.uint32, size)


def _places(shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """The row-major index of each element."""
    result, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        result = result + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return result


def check_size(size: int) -> None:
    if size > MAX_ELEMENTS:
        raise UserError(f"a tensor of {size} elements has more than the {MAX_ELEMENTS} that can be counted")
