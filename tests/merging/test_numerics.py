"""Random masks: they belong to seed, name, model and element, and to nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.merging import OPERATORS, merge_tensors
from jaxlab.merging.numerics import (
    F32,
    Share,
    exponential,
    fold_sum,
    hyperbolic_tangent,
    kept_count,
    largest,
    round_to,
    rounding_by,
    tree_sum,
)
from jaxlab.merging.random_masks import keep_mask, key_words, random_bits, tensor_key


def bits(name="model.norm.weight", size=4096, seed=0, **options):
    return np.asarray(random_bits(jnp.asarray(tensor_key(seed, name)), size, **options))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_product_and_a_sum_are_rounded_apart(times):
    """However often in a row one of them is rounded, and in both ways of rounding."""
    a, b, c = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32)
    want = a * b + c  # NumPy rounds twice
    assert (want != (a.astype(np.float64) * b + c).astype(np.float32)).any()

    def add(x, y, z):
        product = x * y
        for _ in range(times):
            product = round_to(product, F32)
        return round_to(product + z, F32)

    @jax.jit
    def by_zero(zero, *arrays):
        with rounding_by(zero):
            return add(*arrays)

    np.testing.assert_array_equal(jax.jit(add)(a, b, c), want)
    np.testing.assert_array_equal(by_zero(np.uint32(0), a, b, c), want)


@pytest.mark.parametrize("known", [False, True], ids=["barriers", "one loop"])
@pytest.mark.parametrize(
    ("function", "exact"), [(exponential, np.exp), (hyperbolic_tangent, np.tanh)], ids=["exp", "tanh"]
)
def test_functions_are_the_same_in_every_program(function, exact, known):
    """Alone, as the rest of a loop, in vectors, stacked, and beside other work; and right."""

    def of(x):
        if not known:
            return function(x)
        with rounding_by(jnp.asarray(zero)):
            return function(x)

    zero, rng = np.uint32(0), np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=2048), rng.uniform(-103, 88.7, 1024), rng.normal(size=1024) * 1e-5])
    x = x.astype(np.float32)
    whole = np.asarray(jax.jit(of)(x))
    for size in (1, 3, 7, 8, 15, 17, 33):
        parts = [np.asarray(jax.jit(of)(x[i : i + size])) for i in range(0, 4 * size, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[: 4 * size])
    np.testing.assert_array_equal(np.asarray(jax.jit(of)(x.reshape(8, 16, 32))).ravel(), whole)
    beside = jax.jit(lambda v: (of(v) * jnp.float32(3), of(v)))(x)[1]
    np.testing.assert_array_equal(np.asarray(beside), whole)
    wanted = exact(x.astype(np.float64))
    normal = np.abs(wanted) > 2.0**-126
    error = np.abs(whole.astype(np.float64) - wanted)[normal]
    assert (error / np.spacing(np.abs(wanted[normal]).astype(np.float32))).max() < 2
    ends = np.asarray([0.0, -0.0, -np.inf, np.inf, np.nan, 89.0, -105.0, -1e30, 1e30], np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            np.asarray(jax.jit(of)(ends)), np.where(ends == -105, exact(-np.inf), exact(ends))
        )
    assert np.isfinite(np.asarray(jax.jit(of)(np.asarray([88.7], np.float32)))).all()


def test_key_is_the_digest_of_seed_and_name():
    digest = hashlib.sha256(b"7:a").digest()
    assert tensor_key(7, "a").tobytes() == digest[:8]
    assert tensor_key(7, "a").dtype == np.uint32
    keys = {tuple(tensor_key(s, n).tolist()) for s in (0, 1, 11) for n in ("a", "b", "1:a", ":a")}
    assert len(keys) == 12


def test_bits_never_change():
    """Published merges depend on these numbers."""
    assert bits(size=4).tolist() == [3403791094, 1061697901, 2390346517, 2551625724]


def test_chunks_are_parts_of_the_whole():
    whole = bits(size=1000)
    parts = [bits(size=n, offset=at) for at, n in ((0, 1), (1, 332), (333, 667))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_same_bits_eager_jitted_stacked_and_sharded():
    keys = jnp.asarray(np.stack([tensor_key(0, "a"), tensor_key(0, "b")]))
    want = [np.asarray(random_bits(key, 64)) for key in keys]
    stacked = jax.jit(jax.vmap(lambda key: random_bits(key, 64)))(keys)
    np.testing.assert_array_equal(stacked, want)
    mesh = jax.make_mesh((4,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    sharded = jax.jit(jax.vmap(lambda key: random_bits(key, 64)), out_shardings=spread)(keys)
    np.testing.assert_array_equal(sharded, want)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_masks_look_random(density):
    n = 200_000
    key = jnp.asarray(tensor_key(3, "model.layers.0.mlp.up_proj.weight"))
    other = jnp.asarray(tensor_key(3, "model.layers.1.mlp.up_proj.weight"))
    share = jnp.float32(density)
    masks = [
        np.asarray(keep_mask(key, (n,), share)),
        np.asarray(keep_mask(key, (n,), share, stream=1)),
        np.asarray(keep_mask(other, (n,), share)),
    ]
    sigma = np.sqrt(density * (1 - density) / n)
    for mask in masks:
        assert abs(mask.mean() - density) < 5 * sigma
        centred = mask - density
        for lag in (1, 2, 3, 64, 4096):  # neighbours and rows
            correlation = np.mean(centred[lag:] * centred[:-lag]) / (density * (1 - density))
            assert abs(correlation) < 5 / np.sqrt(n)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        correlation = np.mean((masks[i] - density) * (masks[j] - density)) / (density * (1 - density))
        assert abs(correlation) < 5 / np.sqrt(n)


def test_every_bit_is_balanced():
    values = bits(size=100_000)
    ones = [(values >> bit & 1).mean() for bit in range(32)]
    assert np.max(np.abs(np.array(ones) - 0.5)) < 5 * 0.5 / np.sqrt(len(values))
    assert len(np.unique(values)) > 0.9999 * len(values)


def test_ends_of_density_are_exact():
    key = jnp.asarray(tensor_key(0, "a"))
    assert not np.any(keep_mask(key, (10_000,), jnp.float32(0.0)))
    assert np.all(keep_mask(key, (10_000,), jnp.float32(1.0)))


def test_jax_keys_are_keys_too():
    words = np.asarray(jax.random.key_data(jax.random.key(5)))[:2]
    for key in (jax.random.key(5), jax.random.PRNGKey(5), words):
        np.testing.assert_array_equal(key_words(key), words)
    with pytest.raises(UserError, match="a key is"):
        key_words(np.zeros(2, np.int32))


def counted_in_64_bits(name, first, size, stream=0):
    """The definition once more, in Python integers."""
    mask = 0xFFFFFFFF

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
        return x ^ (x >> 16)

    salt = ((stream + 1) * 0x9E3779B9) & mask
    key = [int(word) for word in tensor_key(0, name)]
    start, add = mix((key[0] + salt) & mask), mix(key[1] ^ salt)
    found = []
    for index in range(first, first + size):
        high = mix(((index >> 32) * 0x9E3779B9) & mask)
        found.append(mix((mix((index & mask) ^ start ^ high) + add + high) & mask))
    return found


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**32 - 3, 2**33 + 5, 2**40])
def test_elements_are_counted_in_64_bits(first):
    key = jnp.asarray(tensor_key(0, "a"))
    want = counted_in_64_bits("a", first, 8, stream=1)
    assert np.asarray(random_bits(key, 8, stream=1, offset=first)).tolist() == want
    words = jnp.asarray([first & 0xFFFFFFFF, first >> 32], jnp.uint32)
    traced = jax.jit(lambda words: random_bits(key, 8, stream=1, offset=words))
    assert np.asarray(traced(words)).tolist() == want


def test_blocks_of_4_billion_elements_are_not_copies():
    key = jnp.asarray(tensor_key(0, "a"))
    blocks = [np.asarray(random_bits(key, 4096, offset=block << 32)) for block in range(3)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not set(blocks[i].tolist()) & set(blocks[j].tolist()) or np.mean(blocks[i] == blocks[j]) < 0.01
        agree = np.mean((blocks[i] >> 31) == (blocks[j] >> 31))
        assert abs(agree - 0.5) < 5 * 0.5 / np.sqrt(4096)


def test_tensors_of_more_than_2_to_the_31_elements():
    """By shapes alone: nothing of this size is allocated."""
    shape = (48_000, 65_536)  # 3.1e9
    tensor = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    options = {"weight": [1.0, 0.5], "density": 0.4}
    for method in (
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "sce",
        "karcher",
        "magmax",
    ):
        entry = OPERATORS[method]
        own = {
            k: v
            for k, v in options.items()
            if k in entry.parameters or (k == "weight" and entry.takes("weights"))
        }
        merge = lambda x, y, b, method=method, own=own: merge_tensors(
            method, [x, y], base=b, key=tensor_key(0, "a") if OPERATORS[method].random else None, **own
        )
        merged = jax.eval_shape(merge, tensor, tensor, tensor)
        assert (merged.shape, merged.dtype) == (shape, jnp.bfloat16), method
    lowered = jax.jit(lambda x: largest(x, 2**31 + 7)).lower(tensor).as_text()
    assert "3145728000" in lowered  # counted as such, in 32 bits without a sign
    with pytest.raises(UserError, match="more than the 4294967294"):
        jax.eval_shape(lambda x: largest(x, 5), jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32))


def test_counts_are_exact_beyond_the_31st_bit():
    size = 3_000_000_007
    assert kept_count(1.0, size) == size
    share = Share.of(0.999999999, size)
    assert (int(share.kept), int(share.whole)) == (2_999_999_997 + 7, 2_999_999_997 + 7)
    assert int(Share.of(0.0, size).kept) == 0
    assert int(Share.of(1e-12, size).kept) == 1
    assert int(Share.of(1e-12, size).whole) == 0


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 65, 4097, 200_003])
def test_tree_sums_are_the_same_in_every_program(size):
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    want = np.asarray(tree_sum(jnp.asarray(x)))
    exact = x.astype(np.float64).sum()
    assert abs(want - exact) <= 1e-6 * np.abs(x.astype(np.float64)).sum() + 1e-30
    stacked = np.stack([x + 1, x])
    programs = {
        "jitted": jax.jit(tree_sum)(x),
        "stacked": jax.jit(jax.vmap(tree_sum))(stacked)[1],
        "followed": jax.jit(lambda x: tree_sum(x) * 2 / 2)(x),
        "squares": jax.jit(lambda x: tree_sum(x, of=lambda a: a * jnp.float32(1)))(x),
    }
    for name, got in programs.items():
        np.testing.assert_array_equal(got, want, err_msg=name)
    matrix = np.stack([x, x[::-1]])
    rows = np.asarray(jax.jit(lambda m: fold_sum(m, 1))(matrix))
    np.testing.assert_allclose(rows, matrix.astype(np.float64).sum(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1, 100, 8191, 8192, 50_000])
@pytest.mark.parametrize("kind", ["normal", "coarse", "equal", "spoiled", "rounded"])
def test_largest_is_a_stable_sort(size, kind):
    rng = np.random.default_rng(size)
    x = rng.normal(size=size).astype(np.float32)
    if kind == "coarse":
        x = np.round(x)
    if kind == "equal":
        x = np.ones_like(x)
    if kind == "spoiled":
        x[:: max(size // 7, 1)] = np.nan
        x[1 :: max(size // 5, 2)] = np.inf
    if kind == "rounded":
        x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    order = np.lexsort((np.arange(size), -np.where(np.isnan(x), 0, np.abs(x)), ~np.isnan(x)))
    for count in {0, 1, size // 3, size // 2, size - 1, size}:
        want = np.zeros(size, bool)
        want[order[:count]] = True
        np.testing.assert_array_equal(largest(jnp.asarray(x), count), want, err_msg=str(count))
