"""Random masks: they belong to seed, name, model and element, and to nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.merging.numerics import keep_mask, key_words, random_bits, tensor_key


def bits(name="model.norm.weight", size=4096, seed=0, **options):
    return np.asarray(random_bits(jnp.asarray(tensor_key(seed, name)), size, **options))


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
