"""Ranks of elements by magnitude within rows: sorted where they are asked for, or known before.

XLA's sort takes 100 ns for an element on a CPU, NumPy's of a key and its place in one word a fifth of that.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from jaxlab.merging.numerics import magnitude_bits

_NAN = np.uint32(0x7F800001)
"""Magnitude bits of the least NaN."""
_NORMAL = np.uint32(0x00800000)
"""Those of the least number that XLA's sort on a CPU tells from zero."""
_BLOCK = 1 << 16
"""Keys that a cache holds."""

_active = threading.local()


def ranks(x: Float[Array, "*shape"], axis: int) -> Int32[Array, "*shape"]:
    """How many elements come before each along an axis: those of smaller magnitude, and of equal ones those
    of lower index. NaN are equal and come last; subnormal numbers are zeros.
    """
    context = getattr(_active, "context", None)
    if isinstance(context, list):  # asked for, see `asked_ranks`
        context.append(jnp.moveaxis(magnitude_bits(x), axis, -1))
        return jnp.zeros(x.shape, jnp.int32)
    if context is not None:
        return jnp.moveaxis(next(context), -1, axis)
    order = jnp.argsort(jnp.abs(x), axis=axis, stable=True)
    places = jnp.arange(x.shape[axis], dtype=jnp.int32)
    places = jnp.expand_dims(places, [a for a in range(x.ndim) if a != axis])
    places = jnp.broadcast_to(places, x.shape)
    return jnp.put_along_axis(jnp.zeros(x.shape, jnp.int32), order, places, axis=axis, inplace=False)


@contextlib.contextmanager
def asked_ranks() -> Iterator[list[UInt32[Array, "*rest row"]]]:
    """Traces operators only to see what they ask `ranks` about: magnitude bits, the axis last."""
    _active.context = []
    try:
        yield _active.context
    finally:
        _active.context = None


@contextlib.contextmanager
def known_ranks(found: Sequence[Int32[Array, "*rest row"]] | None) -> Iterator[None]:
    """Traces operators with the ranks that they ask for, in the order in which they do; None: they sort."""
    _active.context = None if found is None else iter(found)
    try:
        yield
    finally:
        _active.context = None


def ranks_of(bits: UInt32[np.ndarray, "*rest row"]) -> Int32[np.ndarray, "*rest row"]:
    """`ranks` of magnitude bits along the last axis, on the host."""
    width = bits.shape[-1]
    flat, result = bits.reshape(-1, width), np.empty(bits.size, np.int32)
    block = max(1, _BLOCK // max(1, width))
    places = np.tile(np.arange(width, dtype=np.int32), block)
    for row in range(0, len(flat), block):
        keys = np.minimum(flat[row : row + block], _NAN)
        keys[keys < _NORMAL] = 0
        keys = keys.astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= np.arange(width, dtype=np.uint64)
        keys.sort(axis=-1)
        keys &= np.uint64(0xFFFFFFFF)
        keys += np.arange(row, row + len(keys), dtype=np.uint64)[:, None] * np.uint64(width)
        result[keys.reshape(-1).view(np.int64)] = places[: keys.size]
    return result.reshape(bits.shape)
