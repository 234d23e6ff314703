"""Ranks within rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.merging.numerics import magnitude_bits
from jaxlab.merging.ranks import known_ranks, ranks, ranks_of


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 40), (40, 3000)])
def test_the_host_ranks_as_the_program_does(shape):
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, shape).astype(np.float32)  # many equal
    flat = x.reshape(-1)
    special = np.array([0x7FC00000, 0xFFC00001, 0x7F800000, 0x80000000, 1, 0], np.uint32).view(np.float32)
    flat[: min(flat.size, 6)] = special[: flat.size]
    x = jnp.asarray(x)
    for axis in range(len(shape)):
        want = np.asarray(ranks(x, axis))
        found = ranks_of(np.moveaxis(np.asarray(magnitude_bits(x)), axis, -1))
        np.testing.assert_array_equal(np.moveaxis(found, -1, axis), want)
        with known_ranks([jnp.asarray(found)]):
            np.testing.assert_array_equal(ranks(x, axis), want)
    row = jnp.asarray([3.0, 1.0, -3.0, 2.0])
    assert np.asarray(jax.jit(lambda x: ranks(x, 0))(row)).tolist() == [2, 0, 3, 1]
