"""Which blocks are chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import (
    compressed_attention,
    num_compressed,
    select_blocks,
    select_blocks_by_importance,
)
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import Case, shrink_tiles

PAPER = {"block_len": 32, "stride": 16, "block_size": 64}


SELECT = jax.jit(
    functools.partial(select_blocks, **PAPER, num_local=1, scale=1.0),
    static_argnames=("num_blocks", "num_init"),
)


def choices(q, k_cmp, lse, **sizes):
    """Blocks selected for every query of the only group, by the paper's geometry and one local block."""
    return np.asarray(SELECT(q, k_cmp, lse, **sizes))[0, 0].tolist()


def one_hot_choice(compressed_block, length=512, **sizes):
    """Choice of the last query where all the softmax lies on one compressed block."""
    blocks = num_compressed(length, 32, 16)
    k_cmp = jnp.full((1, blocks, 1, 1), -100.0).at[0, compressed_block].set(100.0)
    q, lse = jnp.ones((1, length, 1, 1)), jnp.full((1, length, 1), 100.0)
    return choices(q, k_cmp, lse, num_init=0, **sizes)[-1]


def test_a_block_is_scored_by_its_own_tokens():
    # Compressed block 9 holds tokens 144..175, all in block 2; Eq. 9 read from 0 gives them to block 3.
    assert one_hot_choice(9, num_blocks=2) == [2, 7]


def test_a_block_on_the_border_counts_for_both():
    # Compressed block 11 holds tokens 176..207: half of them in block 2, half in block 3.
    assert one_hot_choice(11, num_blocks=3) == [2, 3, 7]


def test_weights_are_the_overlap():
    # Compressed 11 lies half in block 2 and half in block 3; a little weight on 13 (in block 3) decides.
    length, blocks = 512, num_compressed(512, 32, 16)
    q, lse = jnp.ones((1, length, 1, 1)), jnp.zeros((1, length, 1))
    log = jnp.full((1, blocks, 1, 1), -100.0).at[0, 11].set(0.0).at[0, 13].set(-3.0)
    assert choices(q, log, lse, num_init=0, num_blocks=2)[-1] == [3, 7]
    # A whole block counts twice a half: 9 (all in block 2) with 0.6 beats 15 (half in 3, half in 4) with 1.
    log = jnp.full((1, blocks, 1, 1), -100.0).at[0, 15].set(0.0).at[0, 9].set(float(np.log(0.6)))
    assert choices(q, log, lse, num_init=0, num_blocks=2)[-1] == [2, 7]


def test_ties_go_to_the_lowest_block():
    # exp(0 - 0) = 1 for each compressed block: blocks 1 to 6 tie at 8, block 0 has 7 and is forced.
    q, k_cmp, lse = jnp.ones((1, 512, 2, 4)), jnp.zeros((1, 31, 1, 4)), jnp.zeros((1, 512, 2))
    chosen = choices(q, k_cmp, lse, num_blocks=4)
    assert chosen[511] == [0, 1, 2, 7]
    assert chosen[63] == [0, -1, -1, -1]
    assert chosen[64] == [0, 1, -1, -1]


@pytest.mark.parametrize(
    ("small", "segments"),
    [
        (True, ()),
        (True, (100, 37, -20, 143)),
        (False, (100, 37, -20, 143)),
        pytest.param(False, (), marks=pytest.mark.slow),
    ],
)
def test_against_brute_force(monkeypatch, small, segments):
    if small:
        shrink_tiles(monkeypatch)
    case = Case(
        300, heads=8, kv_heads=2, block_len=10, stride=4, block_size=18, num_blocks=6, segments=segments
    )
    args = case.arguments(seed=3)
    q, k_cmp, ids = args["q"], args["k_cmp"], case.segment_ids

    @jax.jit
    def choose(q, k_cmp):
        where = {"block_len": case.block_len, "stride": case.stride, "segment_ids": ids}
        _, lse = compressed_attention(q, k_cmp, k_cmp, **where)
        return select_blocks(q, k_cmp, lse, **case.selection_sizes, segment_ids=ids)

    indices = np.asarray(choose(q, k_cmp))
    assert indices.shape == (1, 2, 300, 6)
    chosen, scores = oracle.brute_force_choice(
        q[0], k_cmp[0], 300, case.sizes, None if ids is None else ids[0]
    )
    different = 0
    for head in range(2):
        for t in range(300):
            row = [int(j) for j in indices[0, head, t] if j >= 0]
            if row != chosen[head][t]:
                # Only blocks whose scores differ by less than float32 can tell may be exchanged.
                worth = [np.sort(scores[head][t][picked]) for picked in (row, chosen[head][t])]
                np.testing.assert_allclose(*worth, rtol=1e-5)
                different += 1
    assert different <= 2


def test_no_gradient_flows_through_the_choice():
    case = Case(40)
    args = case.arguments()

    def choice_as_float(q, k_cmp):
        _, lse = compressed_attention(q, k_cmp, k_cmp, block_len=8, stride=4)
        return jnp.sum(select_blocks(q, k_cmp, lse, **case.selection_sizes).astype(jnp.float32))

    gradients = jax.jit(jax.grad(choice_as_float, argnums=(0, 1)))(args["q"], args["k_cmp"])
    assert all((np.asarray(g) == 0).all() for g in gradients)


def test_any_importance_can_choose():
    # Blocks of two tokens; the lowest finite number is still better than no candidate.
    importance = jnp.asarray([[[-5.0, -9.0, -1e30, -7.0, -9.0, 3.0, 8.0]] * 12])[:, None]
    best = functools.partial(select_blocks_by_importance, block_size=2, num_blocks=4, num_init=1, num_local=1)
    chosen = np.asarray(jax.jit(best)(importance))[0, 0].tolist()
    assert chosen[0] == chosen[1] == [0, -1, -1, -1]
    assert chosen[5] == [0, 1, 2, -1]
    assert chosen[9] == [0, 1, 3, 4]
    assert chosen[11] == [0, 1, 3, 5]  # of equals the first
    # Blocks are counted from the start of the query's text, and padding chooses nothing.
    segments = jnp.asarray([[1] * 4 + [2] * 6 + [0] * 2])
    packed = np.asarray(jax.jit(best)(importance, segment_ids=segments))[0, 0].tolist()
    assert packed[3] == [0, 1, -1, -1]
    assert packed[9] == [0, 1, 2, -1]
    assert packed[11] == [-1] * 4
    # One query at position 9 chooses as it does among all.
    at = jnp.asarray([[9]], jnp.int32)
    alone = jax.jit(best)(importance[:, :, :1], q_positions=at)
    assert np.asarray(alone)[0, 0].tolist() == [chosen[9]]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 1, 4, 1), {}, "1 blocks of 2 do not cover 4 tokens"),
        ((1, 1, 4, 2), {"segment_ids": jnp.ones((1, 5), jnp.int32)}, "2 blocks of 2 do not cover 5 tokens"),
        ((1, 1, 4, 2), {"num_blocks": 2}, "do not fit into num_blocks=2"),
    ],
)
def test_importances_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        select_blocks_by_importance(jnp.zeros(shape), **{"block_size": 2, "num_blocks": 4, **options})
