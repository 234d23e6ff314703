"""Values small enough to work out with pencil and paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import (
    compress_blocks,
    compressed_attention,
    nsa_attention,
    selected_attention,
    window_attention,
)

# With q = 1 and scale = 1 a key log(w) has weight w.
LOG_WEIGHTS = np.log([1.0, 2.0, 3.0, 4.0, 5.0])


def column(values):
    """One batch row, one head, one feature."""
    return jnp.asarray(values, jnp.float32)[None, :, None, None]


ONES = column([1.0] * 5)
KEYS = column(LOG_WEIGHTS)
VALUES = column([60.0, 30.0, 12.0, 0.0, 6.0])


def test_window_of_two_counts_the_current_token():
    out = jax.jit(functools.partial(window_attention, window=2, scale=1.0))(ONES, KEYS, VALUES)
    expected = [60, (60 + 2 * 30) / 3, (2 * 30 + 3 * 12) / 5, (3 * 12 + 0) / 7, (0 + 5 * 6) / 9]
    np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-5)


def test_selection_reads_the_selected_blocks_up_to_the_query():
    attend = jax.jit(functools.partial(selected_attention, block_size=2, scale=1.0))
    # Blocks of two tokens: 0 1 | 2 3 | 4. The second slot is missing for the first three queries.
    indices = jnp.asarray([[0, -1], [0, -1], [1, -1], [0, 1], [0, 2]], jnp.int32)[None, None]
    out = attend(ONES, KEYS, VALUES, indices)
    both = 60 + 2 * 30
    expected = [60, both / 3, 12, (both + 3 * 12 + 0) / 10, (both + 5 * 6) / 8]
    np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-5)
    nothing = attend(ONES, KEYS, VALUES, jnp.full((1, 1, 5, 2), -1, jnp.int32))
    assert (np.asarray(nothing) == 0).all()


def test_compressed_block_is_seen_from_its_last_token_on():
    # Blocks of three tokens, one every second token: 0-2 with weight 2, 2-4 with weight 3.
    keys, values = column(np.log([2.0, 3.0])), column([10.0, 20.0])
    attend = functools.partial(compressed_attention, block_len=3, stride=2, scale=1.0)
    out, lse = jax.jit(attend)(ONES, keys, values)
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 0, 10, 10, 16], rtol=1e-5)
    np.testing.assert_allclose(lse[0, :, 0], [-np.inf, -np.inf, np.log(2), np.log(2), np.log(5)], rtol=1e-5)
    assert (np.asarray(out[0, :2]) == 0).all()


def test_gates_weigh_the_branches():
    # The last token: compression sees weights 2 and 3, the window tokens 3 and 4, selection blocks 0 and 2.
    gates = jnp.broadcast_to(jnp.asarray([1.0, 0.5, 0.25])[None, None, None], (1, 5, 1, 3))
    attend = functools.partial(
        nsa_attention,
        block_len=3,
        stride=2,
        block_size=2,
        num_blocks=2,
        num_init=1,
        num_local=1,
        window=2,
        scale=1.0,
    )
    keys, values = column(np.log([2.0, 3.0])), column([10.0, 20.0])
    out, branches = jax.jit(attend)(ONES, keys, values, KEYS, VALUES, KEYS, VALUES, gates)
    np.testing.assert_array_equal(branches.indices[0, 0], [[0, -1], [0, -1], [0, 1], [0, 1], [0, 2]])
    np.testing.assert_allclose(out[0, 4, 0, 0], 16 + 0.5 * (60 + 60 + 30) / 8 + 0.25 * 30 / 9, rtol=1e-5)


def test_compression_mlp():
    # Two tokens per block, one every token: hidden = 1 * (x0 + 1) + 2 * (x1 - 1) + 3 = x0 + 2 x1 + 2.
    params = {
        "position": [[1.0], [-1.0]],
        "hidden": [[[1.0]], [[2.0]]],
        "hidden_bias": [3.0],
        "output": [[10.0]],
        "output_bias": [0.5],
    }
    params = {name: jnp.asarray(x) for name, x in params.items()}
    out = compress_blocks(column([0.0, -1.0, 0.0]), params, block_len=2, stride=1)
    # hidden 0 and 1; silu(0) = 0, silu(1) = 1 / (1 + 1/e)
    np.testing.assert_allclose(out[0, :, 0, 0], [0.5, 0.5 + 10 * 0.7310586], rtol=1e-6)


@pytest.mark.parametrize(("length", "blocks"), [(1, 0), (31, 0), (32, 1), (47, 1), (48, 2), (100, 5)])
def test_only_complete_blocks_are_compressed(length, blocks):
    params = {
        "position": jnp.zeros((32, 2)),
        "hidden": jnp.zeros((32, 2, 3)),
        "hidden_bias": jnp.zeros(3),
        "output": jnp.zeros((3, 2)),
        "output_bias": jnp.zeros(2),
    }
    compress = functools.partial(compress_blocks, block_len=32, stride=16)
    assert jax.eval_shape(compress, jnp.zeros((1, length, 1, 2)), params).shape == (1, blocks, 1, 2)
