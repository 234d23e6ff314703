"""Packed equals alone: texts that share a row give what each gives by itself, wherever it begins.

The reference is plain float32 `jax.numpy` of one text, from the paper's formulas, without a line of the
package: every mask is of size queries times keys. Texts lie at no multiple of anything.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import (
    block_starts,
    compress_blocks,
    nsa_attention,
    num_compressed,
    select_blocks_by_importance,
)
from tests.kernels_pallas.nsa.cases import Case, shrink_tiles
from tests.kernels_pallas.nsa.test_properties import TOKEN_ARRAYS, layer_arguments

SMALL = Case(84, block_len=8, stride=4, block_size=8, num_blocks=3, num_local=1, window=16)
ODD = Case(
    84, kv_heads=1, block_len=10, stride=3, block_size=7, num_blocks=4, num_init=2, num_local=1, window=9
)


def plain_softmax(q, k, v, mask, scale):
    """q [t, Hkv, G, D], k, v [s, Hkv, D], mask [.., t, s] -> weights [Hkv, G, t, s] and output, 0 for
    nothing."""
    scores = jnp.where(mask, jnp.einsum("thgd,shd->hgts", q, k) * scale, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return weights, jnp.einsum("hgts,shd->thgd", weights, v)


def plain_phi(x, p, case):
    starts = range(0, x.shape[0] - case.block_len + 1, case.stride)
    blocks = []
    for start in starts:
        tokens = x[start : start + case.block_len] + p["position"][:, None]
        hidden = jnp.einsum("jhd,jdf->hf", tokens, p["hidden"]) + p["hidden_bias"]
        blocks.append(hidden / (1 + jnp.exp(-hidden)) @ p["output"] + p["output_bias"])
    return jnp.stack(blocks) if blocks else jnp.zeros((0, *x.shape[1:]))


def compressed_branch(case, args):
    """Weights [Hkv, G, n, M] and output [n, Hkv, G, Dv] of one text."""
    n, _, dim = args["q"].shape
    k_cmp, v_cmp = (plain_phi(args[f"{x}_raw"], args[f"phi_{x}"], case) for x in "kv")
    ends = np.arange(k_cmp.shape[0]) * case.stride + case.block_len - 1
    q = args["q"].reshape(n, case.kv_heads, -1, dim)
    return plain_softmax(q, k_cmp, v_cmp, ends[None] <= np.arange(n)[:, None], dim**-0.5)


def choice(case, args):
    """bool [Hkv, n, N]: the blocks that each query of one text reads."""
    n, shares = args["q"].shape[0], np.asarray(compressed_branch(case, args)[0]).sum(axis=1)
    scores = np.zeros((case.kv_heads, n, -(-n // case.block_size)))
    for i in range(shares.shape[-1]):
        for token in range(i * case.stride, i * case.stride + case.block_len):
            scores[..., token // case.block_size] += shares[..., i]
    chosen = np.zeros(scores.shape, bool)
    for head in range(case.kv_heads):
        for row in range(n):
            own = row // case.block_size
            free = lambda j, own=own: case.num_init <= j <= own - case.num_local
            by_worth = [(free(j), -scores[head, row, j], j) for j in range(own + 1)]
            for _, _, j in sorted(by_worth)[: case.num_blocks]:
                chosen[head, row, j] = True
    return chosen


def alone(case, args, chosen):
    """Output [n, H, Dv] of one text; arrays without a batch axis."""
    n, heads, dim = args["q"].shape
    q, scale = args["q"].reshape(n, case.kv_heads, -1, dim), dim**-0.5
    t, s = np.arange(n)[:, None], np.arange(n)[None]
    listed = chosen[..., np.arange(n) // case.block_size] & (s <= t)
    outs = [
        compressed_branch(case, args)[1],
        plain_softmax(q, args["k_slc"], args["v_slc"], listed[:, None], scale)[1],
        plain_softmax(q, args["k_win"], args["v_win"], (s <= t) & (t - s < case.window), scale)[1],
    ]
    return sum(args["gates"][..., i, None] * x.reshape(n, heads, -1) for i, x in enumerate(outs))


def row_of(lengths, total):
    """Segment ids of texts; negative lengths are padding, and so is what is left of the row."""
    ids = [np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(lengths)]
    ids = np.concatenate([*ids, np.zeros(total, int)])[:total]
    return jnp.asarray(ids[None], jnp.int32)


@functools.cache
def packed(case):
    """Output, chosen blocks and gradients of a packed row, compression included."""

    def attention(args, ids):
        rest = dict(args)
        sizes = {"block_len": case.block_len, "stride": case.stride, "segment_ids": ids}
        k_cmp, v_cmp = (compress_blocks(rest.pop(f"{x}_raw"), rest.pop(f"phi_{x}"), **sizes) for x in "kv")
        out, branches = nsa_attention(**rest, k_cmp=k_cmp, v_cmp=v_cmp, **case.sizes, segment_ids=ids)
        return out, branches.indices

    def step(args, ids, d_out):
        out, pull, indices = jax.vjp(lambda a: attention(a, ids), args, has_aux=True)
        return out, indices, pull(d_out)[0]

    return jax.jit(step)


def compare(case, lengths, seed=0):
    """A packed row against each of its texts alone: output, chosen blocks, all gradients."""
    args = layer_arguments(case)
    ids = row_of(lengths, case.length)
    d_out = jnp.asarray(
        np.random.default_rng(seed).standard_normal((1, case.length, case.heads, case.value_dim)), jnp.float32
    )
    out, indices, gradients = jax.tree.map(np.asarray, packed(case)(args, ids, d_out))
    weights = {name: x for name, x in args.items() if name not in TOKEN_ARRAYS}
    expected = jax.tree.map(np.zeros_like, gradients)
    begin, seen = 0, np.zeros(case.length, bool)
    for length in lengths:
        here = slice(begin, begin + abs(length))
        begin += abs(length)
        if length <= 0:
            continue
        seen[here] = True
        text = {name: args[name][0, here] for name in TOKEN_ARRAYS} | weights
        with jax.numpy_rank_promotion("allow"):
            chosen = choice(case, text)
            found, pull = jax.vjp(lambda a, chosen=chosen: alone(case, a, chosen), text)
            of_text = pull(d_out[0, here])[0]
        np.testing.assert_allclose(out[0, here], found, rtol=2e-5, atol=2e-5)
        for head in range(case.kv_heads):
            for t in range(length):
                row = [j for j in indices[0, head, begin - length + t].tolist() if j >= 0]
                assert row == np.flatnonzero(chosen[head, t]).tolist(), (lengths, length, head, t)
        for name, gradient in of_text.items():
            if name in TOKEN_ARRAYS:
                expected[name][0, here] = gradient
            else:
                expected[name] = jax.tree.map(lambda x, y: x + np.asarray(y), expected[name], gradient)
    assert (out[0, ~seen] == 0).all()
    assert (indices[0][:, ~seen] == -1).all()
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-4)


@pytest.mark.slow  # by default: test_operators.py, with texts at unaligned starts and padding
@pytest.mark.parametrize(
    "lengths",
    [
        (13, 50, 21),
        # Padding first and between, one token, a text without tokens, around the length of a block.
        (-5, 1, 1, 7, 0, 8, 9, 31, -2, 20),
        (1, 1, 7, 1, 8, 9, 57),
    ],
)
def test_texts_that_begin_anywhere(monkeypatch, lengths):
    shrink_tiles(monkeypatch)
    compare(SMALL, lengths)


@pytest.mark.slow
def test_random_packings(monkeypatch):
    """Sizes that divide nothing."""
    shrink_tiles(monkeypatch)
    random = np.random.default_rng(0)
    for _ in range(3):
        compare(ODD, random_lengths(random, ODD.length))


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL, ODD])
def test_many_random_packings(monkeypatch, case):
    shrink_tiles(monkeypatch)
    random = np.random.default_rng(1)
    for seed in range(25):
        compare(case, random_lengths(random, case.length), seed)


def random_lengths(random, total):
    """Texts of every size, some padding; their sum may be less than the row."""
    lengths, left = [], total
    while left > 0 and random.random() < 0.95:
        length = min(left, int(random.choice([1, 2, 5, 11, 23, 40]) + random.integers(0, 9)))
        lengths.append(-length if random.random() < 0.2 else length)
        left -= length
    return tuple(lengths)


@pytest.mark.parametrize(("block_len", "stride"), [(8, 4), (10, 3), (5, 5)])
def test_slots_hold_the_blocks_of_each_text(block_len, stride):
    """Against the rule of the contract: block i of a text from row s on lies in slot ceil(s / stride) + i."""
    random, length = np.random.default_rng(2), 67
    find = jax.jit(functools.partial(block_starts, block_len=block_len, stride=stride))
    slots = num_compressed(length, block_len, stride, packed=True)
    for _ in range(60):
        lengths = random_lengths(random, length)
        expected, begin = np.full(slots, -1), 0
        for n in lengths:
            for i in range(max(0, (n - block_len) // stride + 1)):
                slot = -(-begin // stride) + i
                assert expected[slot] == -1
                expected[slot] = begin + i * stride
            begin += abs(n)
        np.testing.assert_array_equal(find(row_of(lengths, length))[0], expected)


def test_a_stride_that_leaves_tokens_out_is_refused():
    with pytest.raises(ValueError, match="stride 5 exceeds block_len 4"):
        block_starts(row_of((9,), 9), block_len=4, stride=5)


@pytest.mark.slow  # by default each of the two is compared with the oracle
def test_one_text_in_a_row_gives_what_it_gives_without_segments():
    args = layer_arguments(SMALL)
    d_out = jnp.ones((1, SMALL.length, SMALL.heads, SMALL.value_dim))
    one = packed(SMALL)(args, jnp.ones((1, SMALL.length), jnp.int32), d_out)
    none = packed(SMALL)(args, None, d_out)
    np.testing.assert_array_equal(one[1], none[1])
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(none), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_an_importance_is_of_the_blocks_of_ones_own_text():
    importance = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 11, 3)), jnp.float32)
    choose = functools.partial(
        select_blocks_by_importance, block_size=4, num_blocks=2, num_init=0, num_local=1
    )
    both = np.asarray(choose(importance, segment_ids=row_of((3, 8), 11)))
    np.testing.assert_array_equal(both[:, :, :3], choose(importance[:, :, :3]))
    np.testing.assert_array_equal(both[:, :, 3:], choose(importance[:, :, 3:]))
