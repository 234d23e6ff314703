"""Pairs of a query and a selected block, sorted by block."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa.xla.query_block_pairs import Sizes, plan_pairs
from tests.kernels_pallas.nsa.cases import random_selection


def test_pairs_are_sorted_the_same_where_one_integer_does_not_hold_them():
    random = np.random.default_rng(0)
    length, slots, blocks = 211, 3, 30
    indices = jnp.asarray(random_selection(random, (1, 1, length, slots), blocks), jnp.int32)
    sizes = Sizes(length, 8, 1, length * slots // 8 + blocks)
    plan = jax.jit(plan_pairs, static_argnums=(0, 2, 3))
    few, many = plan(sizes, indices, blocks, blocks), plan(sizes, indices, 1 << 22, blocks)
    np.testing.assert_array_equal(few.pair_place, many.pair_place)
    np.testing.assert_array_equal(few.tile_valid, many.tile_valid)
    where = np.asarray(few.tile_valid)
    np.testing.assert_array_equal(np.asarray(few.tile_pair)[where], np.asarray(many.tile_pair)[where])
    np.testing.assert_array_equal(
        np.asarray(few.tile_block)[where[..., 0]], np.asarray(many.tile_block)[where[..., 0]]
    )
