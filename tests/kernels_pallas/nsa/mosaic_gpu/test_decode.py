"""The decode kernel in Pallas' GPU interpreter, against the XLA implementation in float32, on one cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import NewTokens, append_tokens, cached_attention, init_cache, init_paged_cache
from kernels_pallas.nsa.decode_cache import Recent
from kernels_pallas.target import OLDEST_JAX, interpreted
from tests.kernels_pallas.nsa.cases import relative_error

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)
BLOCKS = {"block_len": 8, "stride": 4, "block_size": 64, "window": 64}
SHAPES = {**BLOCKS, "kv_heads": 2, "key_dim": 64, "value_dim": 64, "dtype": jnp.bfloat16}
LENGTHS = (330, 5)
"""Of the rows: many blocks and a window that has come round, shorter than a block."""
TABLE = ((4, 1, 3), (0, -1, -1))


def drawn(cache):
    """Random where something was kept, NaN elsewhere."""
    random = np.random.default_rng(0)
    lengths = np.asarray(LENGTHS)
    draw = lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype)
    return cache._replace(length=jnp.asarray(lengths, jnp.int32)), draw


def contiguous():
    cache, draw = drawn(init_cache(2, 384, **SHAPES))
    kept = {
        name: draw(getattr(cache, name)) for name in ("k_slc", "v_slc", "k_cmp", "v_cmp", "k_win", "v_win")
    }
    filled = {"slc": LENGTHS, "cmp": [(n - 8) // 4 + 1 for n in LENGTHS], "win": LENGTHS}
    for name, x in kept.items():
        there = jnp.arange(x.shape[1])[None] < jnp.asarray(filled[name[2:]])[:, None]
        kept[name] = jnp.where(there[..., None, None], x, jnp.nan)
    return cache._replace(**kept)


def paged():
    """The same in pages of 128 tokens, whose 32 compressed blocks are half a tile."""
    whole = contiguous()
    cache = init_paged_cache(jnp.asarray(TABLE, jnp.int32), num_pages=5, page_size=128, **SHAPES)
    own = {name: getattr(whole, name) for name in ("k_win", "v_win", "length")}
    cache = cache._replace(**own)
    for name in ("k_slc", "v_slc", "k_cmp", "v_cmp"):
        pages = jnp.full_like(getattr(cache, name), jnp.nan)
        size = pages.shape[1]
        for row, numbers in enumerate(TABLE):
            for i, page in enumerate(numbers):
                if page >= 0:
                    piece = getattr(whole, name)[row, i * size : (i + 1) * size]
                    pages = pages.at[page, : len(piece)].set(piece)
        cache = cache._replace(**{name: pages})
    return cache


@functools.partial(jax.jit, static_argnames=("name", "num_blocks"))
def attend(cache, q, gates, num_new, name, indices=None, num_blocks=3):
    held = jnp.zeros(cache.k_win.shape[:2], jnp.int32)  # the kernel works out what the ring holds
    newest = cache.length[:, None] - 1
    held = jnp.maximum(newest - (newest - jnp.arange(held.shape[1])[None]) % held.shape[1], -1)
    recent = Recent(cache.k_win, cache.v_win, held, num_new)
    out, branches = cached_attention(
        cache,
        recent,
        q,
        gates,
        **BLOCKS,
        num_blocks=num_blocks,
        num_local=1,
        indices=indices,
        implementation=name,
    )
    return out, branches.compressed, branches.selected, branches.window, branches.lse, branches.indices


@pytest.mark.parametrize(
    ("make", "heads"), [(paged, 32), pytest.param(contiguous, 6, marks=pytest.mark.slow)]
)
def test_one_token_of_rows_of_different_lengths(make, heads):
    cache = make()
    random = np.random.default_rng(1)
    q = jnp.asarray(random.standard_normal((2, 1, heads, 64)), jnp.bfloat16)
    gates = jnp.asarray(random.random((2, 1, heads, 3)), jnp.bfloat16)
    num_new = jnp.asarray([1, 1], jnp.int32)
    with interpreted():
        *found, indices = attend(cache, q, gates, num_new, "mosaic_gpu")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (cache, q, gates))
    *expected, chosen = attend(*wide, num_new, "xla")
    np.testing.assert_array_equal(indices, chosen)
    for x, reference in zip(found, expected, strict=True):
        x, reference = (np.where(np.isneginf(y), 0, np.asarray(y, np.float32)) for y in (x, reference))
        assert np.isfinite(x).all()
        assert relative_error(x, reference) < 0.005


def test_given_blocks_in_any_order_and_a_row_without_a_token():
    cache = contiguous()
    random = np.random.default_rng(2)
    q = jnp.asarray(random.standard_normal((2, 1, 2, 64)), jnp.bfloat16)
    gates = jnp.ones((2, 1, 2, 3), jnp.bfloat16)
    num_new = jnp.asarray([1, 0], jnp.int32)
    indices = jnp.broadcast_to(jnp.asarray([5, -1, 0, 3, 99], jnp.int32), (2, 2, 1, 5))
    with interpreted():
        found = attend(cache, q, gates, num_new, "mosaic_gpu", indices)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (cache, q, gates))
    expected = attend(*wide, num_new, "xla", indices)
    for x, reference in zip(found[:4], expected[:4], strict=True):
        assert (np.asarray(x[1], np.float32) == 0).all()
        assert relative_error(np.asarray(x, np.float32), reference) < 0.005


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key_dim": 96}, "head dims 96/64 of a cache must be multiples of 64"),
        ({"window": 40}, "a window of 40 is no multiple of 64"),
        ({"page_size": 64, "stride": 16}, "4 compressed blocks a page"),
        ({"dtype": jnp.float32}, "TF32"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_its_reason(change, reason):
    sizes = SHAPES | {"block_len": 32, "page_size": 128} | change
    cache = init_paged_cache(jnp.zeros((1, 1), jnp.int32), num_pages=1, **sizes)
    q = jnp.zeros((1, 1, 2, sizes["key_dim"]), sizes["dtype"])
    recent = Recent(
        cache.k_win, cache.v_win, jnp.zeros((1, sizes["window"]), jnp.int32), jnp.ones(1, jnp.int32)
    )
    own = {name: sizes[name] for name in BLOCKS}
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        cached_attention(cache, recent, q, q[..., :3], **own, implementation="mosaic_gpu")


@pytest.mark.slow
def test_a_chunk_after_what_the_cache_holds():
    """Prefill goes through the kernels of whole sequences; row 0 has a token of padding, row 1 nothing."""
    cache = init_cache(2, 128, **SHAPES | {"kv_heads": 1})
    random = np.random.default_rng(3)
    num_new = jnp.asarray([2, 0], jnp.int32)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
    drawn = {name: x for name, x in cache._asdict().items() if name != "length" and x is not None}
    kept = {name: draw(*x.shape) for name, x in drawn.items()}
    cache = cache._replace(**kept, length=jnp.asarray([90, 3], jnp.int32))
    new = NewTokens(*[draw(2, 3, 1, 64) for _ in range(6)])
    q, gates = draw(2, 3, 2, 64), draw(2, 3, 2, 3)

    def step(cache, new, q, gates, name):
        compress = lambda k, v, starts: (k[:, : starts.shape[1]], v[:, : starts.shape[1]])
        cache, recent = append_tokens(cache, new, compress, block_len=8, stride=4, num_new=num_new)
        return cached_attention(
            cache, recent, q, gates, **BLOCKS, num_blocks=2, num_local=1, implementation=name
        )[0]

    step = jax.jit(step, static_argnums=4)
    with interpreted():
        found = np.asarray(step(cache, new, q, gates, "mosaic_gpu"), np.float32)
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (cache, new, q, gates)
    )
    expected = np.asarray(step(*wide, "xla"))
    for row, count in enumerate(num_new):
        assert (found[row, count:] == 0).all()
    assert relative_error(found, expected) < 0.005
