"""Random masks whose bits depend on neither the compiler nor the number of devices.

An element's bits are a hash of (seed, tensor name, which model, index of the element), with no state: the
same on every device, in any order, in any chunks. Integer multiplications and shifts only, several times
cheaper than threefry.
"""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from jaxlab.errors import UserError
from jaxlab.merging.numerics import check_size


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
    key: UInt32[Array, "2"],
    size: int,
    *,
    stream: int | UInt32[Array, ""] = 0,
    offset: int | UInt32[Array, "2"] = 0,
) -> UInt32[Array, " {size}"]:
    """Bits of `size` elements of a tensor from `offset` on (row-major); `stream` tells models apart.

    Elements are counted in 64 bits: an offset is an integer, or traced its two words, the lower first.
    """
    check_size(size)
    salt = (jnp.asarray(stream, jnp.uint32) + jnp.uint32(1)) * jnp.uint32(0x9E3779B9)
    first, second = _mix(key[0] + salt), _mix(key[1] ^ salt)
    index = jax.lax.iota(jnp.uint32, size)
    if isinstance(offset, int) and offset + size <= 1 << 32:
        return _mix(_mix((index + jnp.uint32(offset)) ^ first) + second)
    words = (offset & 0xFFFFFFFF, offset >> 32) if isinstance(offset, int) else (offset[0], offset[1])
    low, high = (jnp.asarray(word, jnp.uint32) for word in words)
    index = index + low
    high = _mix((high + (index < low).astype(jnp.uint32)) * jnp.uint32(0x9E3779B9))  # 0 for the first 2^32
    return _mix(_mix(index ^ first ^ high) + (second + high))


def uniform(
    key: UInt32[Array, "2"],
    shape: tuple[int, ...],
    *,
    stream: int | UInt32[Array, ""] = 0,
    offset: int | UInt32[Array, "2"] = 0,
) -> UInt32[Array, "..."]:
    """Uniformly random integers of 24 bits, which are exact in float32; arguments as for `random_bits`."""
    bits = random_bits(key, math.prod(shape), stream=stream, offset=offset)
    return (bits >> jnp.uint32(8)).reshape(shape)


def keep_mask(
    key: UInt32[Array, "2"],
    shape: tuple[int, ...],
    density: Float[Array, "..."],
    *,
    stream: int | UInt32[Array, ""] = 0,
    offset: int | UInt32[Array, "2"] = 0,
) -> Bool[Array, "..."]:
    """True with probability `density` (float32, may be traced; one for all or one for each element),
    independently for each element: density 0 keeps nothing and 1 everything.
    """
    bound = jnp.ceil(density * jnp.float32(2.0**24)).astype(jnp.uint32)
    return uniform(key, shape, stream=stream, offset=offset) < bound
