"""Arguments that do not fit: one line that names the argument. And NaN that a query does not see."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas.nsa import (
    NewTokens,
    append_tokens,
    attend_to_text,
    cached_attention,
    compress_blocks,
    compressed_attention,
    debug_checks,
    init_cache,
    nsa_attention,
    num_compressed,
    select_blocks,
    selected_attention,
    window_attention,
)
from tests.kernels_pallas.nsa.cases import Case
from tests.kernels_pallas.nsa.test_properties import TOKEN_ARRAYS, layer, layer_arguments

CASE = Case(40, heads=4, kv_heads=2)
Q, KV = jnp.ones((1, 6, 4, 3)), jnp.ones((1, 6, 2, 3))
SWAPPED = jnp.ones((1, 4, 6, 3)), jnp.ones((1, 2, 6, 3))
"""Q and KV as [B, H, T, D]."""
INDICES = jnp.zeros((1, 2, 6, 1), jnp.int32)
CMP = jnp.ones((1, 2, 2, 3))


def whole(**changes):
    """`nsa_attention` with one argument changed."""
    args = CASE.arguments()
    args |= {name: change(args[name]) for name, change in changes.items()}
    return nsa_attention(**args, **CASE.sizes)


def swap(x):
    return x.swapaxes(1, 2)


def of_text(*, tokens=lambda name, x: x, q=Q, **changes):
    """`attend_to_text` of six tokens with something changed."""
    given = NewTokens(*(tokens(name, KV) for name in NewTokens._fields))
    sizes = {"block_len": 4, "stride": 2, "block_size": 2, "num_blocks": 3, "window": 2}
    return attend_to_text(q, given, jnp.ones((1, 6, 4, 3)), {}, {}, **(sizes | changes))


@pytest.fixture
def as_users_run_it():
    """Without the checks of annotations that tests add, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def with_cache(*, tokens=lambda name, x: x, q=Q[:, :1], indices=None):
    """One token over a cache, with something changed."""
    blocks = {"block_len": 4, "stride": 2}
    cache = init_cache(
        1, 8, kv_heads=2, key_dim=3, value_dim=3, dtype=jnp.float32, block_size=2, window=2, **blocks
    )
    new = NewTokens(*(tokens(name, KV[:, :1]) for name in NewTokens._fields))
    compress = lambda k, v, _: tuple(compress_blocks(x, {}, **blocks) for x in (k, v))
    cache, recent = append_tokens(cache, new, compress, **blocks)
    sizes = {"block_size": 2, "num_blocks": 3, "window": 2, **blocks}
    return cached_attention(cache, recent, q, jnp.ones((*q.shape[:3], 3)), indices=indices, **sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: whole(v_win=lambda x: x[..., :6]), "v_win has head dim 6, v_slc 10: the branches are added"),
        (lambda: whole(v_cmp=lambda x: x[..., :6]), "v_cmp has head dim 6, v_slc 10: the branches are added"),
        (lambda: whole(k_win=lambda x: x[..., :6]), "k_win has head dim 6, q 12"),
        (lambda: whole(v_slc=lambda x: x[:, :39]), "v_slc has 39 entries, k_slc 40"),
        (
            lambda: whole(k_win=lambda x: x[:, :39], v_win=lambda x: x[:, :39]),
            "k_win has 39 entries, k_slc 40",
        ),
        (
            lambda: whole(q=lambda x: x[:, :39], gates=lambda x: x[:, :39]),
            "39 queries against 40 keys need q_positions",
        ),
        (
            lambda: whole(k_cmp=lambda x: x[:, :3], v_cmp=lambda x: x[:, :3]),
            "k_cmp: 40 tokens have 9 complete blocks of 8 every 4, not 3",
        ),
        (lambda: whole(gates=lambda x: x[..., :2]), r"gates have shape \(1, 40, 4, 2\)"),
        (lambda: whole(gates=swap), r"gates have .* look like \[B, H, T, D\]"),
        (lambda: whole(k_win=swap, v_win=swap), "k_win has 40 heads, k_slc 2"),
        (lambda: whole(k_cmp=swap, v_cmp=swap), "k_cmp has 9 heads, k_slc 2"),
        (
            lambda: whole(**dict.fromkeys(("q", "k_slc", "v_slc", "k_win", "v_win", "gates"), swap)),
            "k_cmp has 2 heads, k_slc 40",
        ),
        (lambda: whole(v_win=lambda x: x.astype(jnp.bfloat16)), "v_win has dtype bfloat16, q float32"),
        (
            lambda: whole(k_slc=lambda x: x[0]),
            r"k_slc must have the 4 axes \[B, T, H, D\], not the shape \(40, 2, 12\)",
        ),
        (lambda: whole(v_cmp=lambda x: jnp.concatenate([x, x])), "v_cmp has batch 2, q 1"),
        (
            lambda: whole(q=lambda x: x[:, :, :3], gates=lambda x: x[:, :, :3]),
            "3 query heads cannot share 2 key/value heads of k_slc",
        ),
        (lambda: window_attention(SWAPPED[0], SWAPPED[1], SWAPPED[1], window=2), r"look like \[B, H, T, D\]"),
        (lambda: window_attention(Q, KV, KV[:, :, :1], window=2), "v has 1 heads, k 2"),
        (lambda: window_attention(Q.astype(int), KV, KV, window=2), "q must be floating point, not int32"),
        (lambda: selected_attention(Q, KV, KV, INDICES[..., 0], block_size=2), "indices have shape"),
        (
            lambda: selected_attention(Q, KV, KV, INDICES.astype(float), block_size=2),
            "indices must be integers",
        ),
        (
            lambda: selected_attention(Q, KV, KV, INDICES, block_size=2, segment_ids=jnp.ones((1, 5), int)),
            "segment_ids have shape",
        ),
        (
            lambda: window_attention(Q, KV, KV, window=2, q_positions=jnp.ones((1, 5), int)),
            "q_positions have shape",
        ),
        (
            lambda: compressed_attention(
                Q, CMP, CMP, block_len=4, stride=2, segment_ids=jnp.ones((2, 6), int)
            ),
            "segment_ids have shape",
        ),
        (
            lambda: select_blocks(
                Q, CMP, Q[..., 0], block_len=4, stride=2, block_size=2, num_blocks=3, num_init=-1
            ),
            "num_init must not be negative",
        ),
        (lambda: of_text(tokens=lambda _, x: x[:, :5]), "k_cmp has 5 tokens, q 6"),
        (
            lambda: of_text(tokens=lambda name, x: x[:, :5] if name.endswith("win") else x),
            "k_win has 5 tokens, q 6",
        ),
        (lambda: of_text(tokens=lambda _, x: swap(x)), r"6 key/value heads of k_slc: .* \[B, H, T, D\]"),
        (lambda: of_text(segment_ids=jnp.ones((6,), int)), r"segment_ids have shape \(6,\), not \[1, 6\]"),
        (lambda: of_text(segment_ids=jnp.ones((1, 5), int)), r"segment_ids have shape \(1, 5\), not"),
        (lambda: of_text(segment_ids=jnp.ones((1, 6))), "segment_ids must be integers, not float32"),
        (lambda: of_text(positions=jnp.arange(6)), r"positions have shape \(6,\), not \(1, 6\)"),
        (lambda: of_text(positions=jnp.zeros((1, 5), int)), r"positions have shape \(1, 5\), not \(1, 6\)"),
        (
            lambda: of_text(branches=("window", "choice")),
            "branches must be some of compression, selection, w",
        ),
        (lambda: of_text(branches="window"), "branches must be some of .* not 'window'"),
        (lambda: of_text(branches=()), r"branches must be some of .* not \(\)"),
        (lambda: window_attention(Q, KV, KV, window=2.0), "window must be a whole number, not 2.0"),
        (lambda: window_attention(Q[:, :0], KV[:, :0], KV[:, :0], window=2), "q has no tokens"),
        (
            lambda: window_attention(Q, KV, KV, window=2, q_positions=jnp.ones((1, 6))),
            "q_positions must be integers, not float32",
        ),
        (
            lambda: compress_blocks(KV[0], {}, block_len=4, stride=2),
            r"must have the 4 axes \[B, T, H, D\], not the shape \(6, 2, 3\)",
        ),
        (
            lambda: compress_blocks(KV, {}, block_len=4, stride=2, segment_ids=jnp.ones((1, 5), int)),
            r"segment_ids have shape \(1, 5\), not \(1, 6\)",
        ),
        (
            lambda: with_cache(tokens=lambda name, x: x[:, :, :1] if name == "v_win" else x),
            r"v_win of the chunk has shape \(1, 1, 1, 3\); for this cache it must be \(1, 1, 2, 3\)",
        ),
        (
            lambda: with_cache(q=Q[:, :1, :3]),
            "3 query heads cannot share 2 key/value heads of k_win of the c",
        ),
        (lambda: with_cache(q=Q[:, :1, :, :2]), "k_win of the cache has head dim 3, q 2"),
        (
            lambda: with_cache(q=Q[:, :1].astype(jnp.bfloat16)),
            "k_win of the cache has dtype float32, q bfloat",
        ),
        (lambda: with_cache(indices=jnp.zeros((1, 1, 2, 3), int)), r"indices have shape \(1, 1, 2, 3\)"),
        (lambda: compress_blocks(KV, {}, block_len=0, stride=2), "block_len must be positive, not 0"),
        (
            lambda: compress_blocks(KV, {"position": KV}, block_len=4, stride=2),
            "compression parameters are position, not bias, position, weight",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_the_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 2, 2, -1], r"indices\[0, 1, 30\] = \[0, 2, 2, -1\]: slot 2 is twice"),
        ([1, 0, -1, -1], r"indices\[0, 1, 30\] = \[1, 0, -1, -1\]: slot 1 is out of order"),
        ([0, -1, 2, 3], "slot 2 is out of order"),
        ([0, 1, 3, 4], "slot 3 is after the query's own block"),
    ],
)
def test_indices_are_checked_where_that_is_asked_for(row, message):
    args = CASE.arguments()
    q, k, v = args["q"], args["k_slc"], args["v_slc"]
    indices = jnp.zeros((1, 2, 40, 4), jnp.int32).at[..., 1:].set(-1).at[0, 1, 30].set(jnp.asarray(row))
    attend = lambda indices: selected_attention(q, k, v, indices, block_size=8)
    compiled = lambda: (jax.block_until_ready(jax.jit(lambda x: attend(x))(indices)), jax.effects_barrier())
    if row[0] == 1:
        compiled()
    with debug_checks():
        with pytest.raises(ValueError, match=message):
            attend(indices)
        if row[0] == 1:
            with pytest.raises(Exception, match=message):  # jax's, from inside of the compiled function
                compiled()


def test_nan_in_the_future_does_not_reach_the_past_of_packed_texts():
    moment, args = 21, layer_arguments(CASE)
    ids = jnp.asarray([[1] * 5 + [2] * 35], jnp.int32)
    run = jax.jit(lambda args: layer(CASE, args, ids))
    clean = run(args)
    for bad in (jnp.nan, jnp.inf):
        later = {name: x.at[:, moment:].set(bad) if name in TOKEN_ARRAYS else x for name, x in args.items()}
        found = run(later)
        np.testing.assert_array_equal(found[:, :moment], clean[:, :moment])
        assert not np.isfinite(found[:, moment:]).any()  # who sees it, knows


def test_nan_in_the_future_reaches_no_output_or_gradient_of_the_past():
    """Of a loss of the queries before it; whoever is asked for the others gets NaN."""
    moment, args = 21, CASE.arguments()
    first = num_compressed(moment, CASE.block_len, CASE.stride)  # the blocks that hold what is bad
    starts = {name: first if name.endswith("cmp") else moment for name in args if name[0] in "kv"}
    before = np.arange(CASE.length) < moment

    @jax.jit
    def run(args, asked):
        def loss(args):
            out = nsa_attention(**args, **CASE.sizes)[0]
            return jnp.sum(jnp.sin(jnp.where(asked[None, :, None, None], out, 0.0))), out

        gradients, out = jax.grad(loss, has_aux=True)(args)
        return gradients, out

    clean, clean_out = run(args, before)
    for names in ("kv", "k", "v"):
        for bad in (jnp.nan, jnp.inf):
            later = dict(args)
            for name, start in starts.items():
                if name[0] in names:
                    later[name] = args[name].at[:, start:].set(bad)
            found, out = run(later, before)
            np.testing.assert_array_equal(out[:, :moment], clean_out[:, :moment])
            assert not np.isfinite(out[:, moment:]).any()  # who sees it, knows
            for name in args:
                end = starts.get(name, moment)
                np.testing.assert_array_equal(found[name][:, :end], clean[name][:, :end], err_msg=name)
    everything, _ = run(later, np.ones_like(before))
    assert not np.isfinite(everything["q"][:, moment:]).any()
