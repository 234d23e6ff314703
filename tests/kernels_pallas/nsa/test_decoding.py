"""Decoding and prefill in chunks over a cache, contiguous and paged, against the attention on whole
sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import (
    NewTokens,
    append_tokens,
    bytes_per_decoded_token,
    cached_attention,
    compress_blocks,
    init_cache,
    init_paged_cache,
    nsa_attention,
)
from tests.kernels_pallas.nsa.cases import Case

CASE = Case(40, key_dim=6, value_dim=4, batch=3, num_blocks=4, window=6)
LENGTHS = (40, 23, 5)
"""Of the rows; the last is shorter than a block."""
BLOCKS = {"block_len": CASE.block_len, "stride": CASE.stride}
SHAPES = {
    **BLOCKS,
    "block_size": CASE.block_size,
    "window": CASE.window,
    "kv_heads": CASE.kv_heads,
    "key_dim": CASE.key_dim,
    "value_dim": CASE.value_dim,
    "dtype": jnp.float32,
}


def compression(dim: int, seed: int) -> dict[str, jax.Array]:
    shapes = {"position": (8, dim), "hidden": (8, dim, 5), "hidden_bias": (5,), "output": (5, dim)}
    random = np.random.default_rng(seed)
    shapes["output_bias"] = (dim,)
    return {name: jnp.asarray(0.5 * random.standard_normal(s), jnp.float32) for name, s in shapes.items()}


KEY, VALUE = compression(CASE.key_dim, 1), compression(CASE.value_dim, 2)


def compress(k, v, starts):
    """A key depends on where its block starts, as it does with rotary positions."""
    turn = jnp.cos(0.3 * starts.astype(jnp.float32))[:, :, None, None]
    return compress_blocks(k, KEY, **BLOCKS) * turn, compress_blocks(v, VALUE, **BLOCKS)


@functools.cache
def whole() -> tuple[dict[str, jax.Array], np.ndarray, np.ndarray]:
    """Inputs for tokens (k_cmp is what will be compressed), and outputs and choice for whole sequences."""
    x = CASE.arguments()
    tokens = np.random.default_rng(3)
    for name in ("k_cmp", "v_cmp"):
        shape = x[name.replace("cmp", "slc")].shape
        x[name] = jnp.asarray(tokens.standard_normal(shape), jnp.float32)
    starts = jnp.broadcast_to(CASE.stride * jnp.arange(CASE.blocks, dtype=jnp.int32)[None], (3, CASE.blocks))
    k_cmp, v_cmp = compress(x["k_cmp"], x["v_cmp"], starts)
    out, branches = jax.jit(functools.partial(nsa_attention, **CASE.sizes))(
        **(x | {"k_cmp": k_cmp, "v_cmp": v_cmp})
    )
    return x, np.asarray(out), np.asarray(branches.indices)


@jax.jit
def step(cache, chunk, num_new):
    new = NewTokens(**{name: chunk[name] for name in NewTokens._fields})
    cache, recent = append_tokens(cache, new, compress, **BLOCKS, num_new=num_new)
    out, branches = cached_attention(cache, recent, chunk["q"], chunk["gates"], **CASE.sizes)
    return cache, out, branches.indices


def poisoned(cache):
    """NaN wherever nothing was written yet."""
    kept = {name: x for name, x in cache._asdict().items() if name[:2] in ("k_", "v_") and x is not None}
    return cache._replace(**{name: jnp.full_like(x, jnp.nan) for name, x in kept.items()})


def contiguous():
    return poisoned(init_cache(3, 37, **SHAPES))  # 37 is rounded up to 40


def paged():
    """Ten pages of eight tokens, in no order, and none where a row ends before."""
    table = jnp.asarray([[7, 2, 9, 0, 4], [5, 1, 8, -1, -1], [3, -1, -1, -1, -1]], jnp.int32)
    return poisoned(init_paged_cache(table, num_pages=10, page_size=8, **SHAPES))


@functools.cache
def read(make, chunk: int, lengths: tuple[int, ...] = LENGTHS):
    """Outputs and choices of all tokens, read at most `chunk` at a time, every row at its own pace."""
    x, expected, chosen = whole()
    random = np.random.default_rng(chunk)
    out, indices = np.full_like(expected, np.nan), np.full_like(chosen, -2)
    cache, at = make(), np.zeros(3, int)
    while (at < lengths).any():
        num_new = np.minimum(random.integers(0, chunk + 1, 3), lengths - at)
        piece = {name: np.full((3, chunk, *y.shape[2:]), np.nan, np.float32) for name, y in x.items()}
        places = [slice(start, start + count) for start, count in zip(at, num_new, strict=True)]
        for row, (place, count) in enumerate(zip(places, num_new, strict=True)):
            for name, y in x.items():
                piece[name][row, :count] = y[row, place]
        cache, new, blocks = step(cache, piece, jnp.asarray(num_new, jnp.int32))
        for row, (place, count) in enumerate(zip(places, num_new, strict=True)):
            out[row, place] = new[row, :count]
            indices[row, :, place] = blocks[row, :, :count]
            assert (np.asarray(new)[row, count:] == 0).all()
        at += num_new
    return out, indices, cache


@pytest.mark.parametrize(
    ("make", "chunk"),
    [
        (contiguous, 1),
        (paged, 1),
        (paged, 16),
        pytest.param(contiguous, 16, marks=pytest.mark.slow),
    ],
)
def test_every_token_gets_what_it_gets_in_the_whole_sequence(make, chunk):
    _, expected, selected = whole()
    out, indices, cache = read(make, chunk)
    np.testing.assert_array_equal(cache.length, LENGTHS)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=1e-5)
        np.testing.assert_array_equal(indices[row, :, :length], selected[row, :, :length])
    if make is paged:
        # Nobody has page 6; row 1 ends in page 8, row 2 in page 3.
        filled = ~np.isnan(np.asarray(cache.k_slc)).any(axis=(1, 2, 3))
        np.testing.assert_array_equal(filled, [True, True, True, False, True, True, False, True, False, True])
        assert np.isnan(cache.k_slc[6]).all()
        assert np.isnan(cache.v_cmp[6]).all()


def test_one_token_reads_only_the_blocks_that_are_selected_for_it():
    x, expected, selected = whole()
    cache = read(contiguous, 1, (39, 39, 39))[2]
    kept = np.zeros((3, 5, 2), bool)
    for row in range(3):
        for head in range(2):
            kept[row, selected[row, head, 39], head] = True
    assert not kept.all()
    of_tokens = np.repeat(kept, 8, axis=1)[..., None]
    cache = cache._replace(
        k_slc=jnp.where(of_tokens, cache.k_slc, jnp.nan), v_slc=jnp.where(of_tokens, cache.v_slc, jnp.nan)
    )
    last = {name: np.asarray(y)[:, 39:] for name, y in x.items()}
    _, out, _ = step(cache, last, jnp.ones((3,), jnp.int32))
    np.testing.assert_allclose(out[:, 0], expected[:, 39], atol=1e-5)


def test_compression_runs_only_when_a_block_is_complete():
    starts = []

    def counting(k, v, start):
        jax.debug.callback(lambda s: starts.append(int(s[0, 0])), start, ordered=True)
        return k[:, :1], v[:, :1]

    cache = init_cache(
        1,
        12,
        kv_heads=1,
        key_dim=1,
        value_dim=1,
        dtype=jnp.float32,
        block_len=4,
        stride=2,
        block_size=2,
        window=1,
    )
    one = jnp.zeros((1, 1, 1, 1), jnp.float32)
    add = jax.jit(lambda c, x: append_tokens(c, NewTokens(*[x] * 6), counting, block_len=4, stride=2)[0])
    for token in range(11):
        cache = add(cache, one + token)
    jax.effects_barrier()
    assert starts == [0, 2, 4, 6]
    np.testing.assert_array_equal(cache.k_cmp[0, :5, 0, 0], [0, 2, 4, 6, 0])
    np.testing.assert_array_equal(cache.k_wait[0, :, 0, 0], [8, 9, 10])


def test_bytes_are_the_papers():
    table = ((8192, 2048, 4), (16384, 2560, 6.4), (32768, 3584, 9.1), (65536, 5632, 11.6))
    for length, tokens, factor in table:
        traffic = bytes_per_decoded_token(length)
        assert traffic.nsa_tokens == tokens
        assert traffic.nsa_bytes == tokens * 4 * (192 + 128) * 2
        assert round(traffic.dense_bytes / traffic.nsa_bytes, 1) == factor
    assert bytes_per_decoded_token(8192, branches=("compression", "window")).nsa_tokens == 512 + 512
    assert bytes_per_decoded_token(20, itemsize=1, kv_heads=1).nsa_tokens == 1 + 20 + 20


def test_errors():
    with pytest.raises(ValueError, match="stride 9 exceeds block_len 8"):
        init_cache(1, 8, **(SHAPES | {"stride": 9}))
    with pytest.raises(ValueError, match="window must be positive, not 0"):
        init_cache(1, 8, **(SHAPES | {"window": 0}))
    table = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="page_size 12 must be a multiple of block_size 8 and of stride 4"):
        init_paged_cache(table, num_pages=1, page_size=12, **SHAPES)
    cache, x = contiguous(), whole()[0]
    new = lambda size: NewTokens(**{name: x[name][:, :size] for name in NewTokens._fields})
    with pytest.raises(ValueError, match="a chunk of 3 x 0 tokens for a cache of 3 rows"):
        append_tokens(cache, new(0), compress, **BLOCKS)
    with pytest.raises(ValueError, match="was made for block_len 8, not 4"):
        append_tokens(cache, new(1), compress, block_len=4, stride=4)
    with pytest.raises(ValueError, match="sizes must be positive, not 0"):
        bytes_per_decoded_token(0)
    cache, recent = jax.eval_shape(lambda c: append_tokens(c, new(1), compress, **BLOCKS), cache)
    with pytest.raises(ValueError, match="2 queries and a window of 6 do not fit 6 recent keys"):
        cached_attention(cache, recent, x["q"][:, :2], x["gates"][:, :2], **CASE.sizes)


@pytest.mark.parametrize("paged", [False, True])
def test_sizes_that_a_cache_was_not_made_for_are_named(paged):
    """What they would read is not what the cache holds, and nothing else would tell."""
    shapes = SHAPES | {"key_dim": 6, "value_dim": 4}
    if paged:
        make = lambda: init_paged_cache(jnp.zeros((1, 1), jnp.int32), num_pages=1, page_size=520, **shapes)
    else:
        make = lambda: init_cache(1, 520, **shapes)
    cache = jax.eval_shape(make)
    x = whole()[0]
    new = NewTokens(**{name: x[name][:1, :1] for name in NewTokens._fields})
    append = lambda c, **sizes: append_tokens(c, new, compress, **(BLOCKS | sizes))
    with pytest.raises(ValueError, match="made for another stride than 2"):
        jax.eval_shape(lambda c: append(c, stride=2), cache)
    cache, recent = jax.eval_shape(append, cache)
    attend = lambda **sizes: cached_attention(
        cache, recent, x["q"][:1, :1], x["gates"][:1, :1], **(CASE.sizes | sizes)
    )
    for sizes, message in (
        ({"stride": 2}, "made for another stride than 2"),
        ({"block_len": 12}, "was made for block_len 8, not 12"),
        ({"block_size": 12}, "made for another block_size than 12: it holds 520 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(**sizes)
