"""What compresses a block: an MLP, one linear map, the mean. Whole texts, a cache, and from a dense model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import abstract_params, forward, init_cache, init_params
from jaxlab.retrofit.convert import retrofit
from tests.models.tiny import NSA, draw_params, draw_tokens, make_config

DENSE = make_config(num_layers=2, attention_bias=True)
run = jax.jit(forward, static_argnames="config")


def config_of(kind, **more):
    return make_config("nsa", attention=dataclasses.replace(NSA, compress_kind=kind, **more))


def test_a_retrofit_begins_as_the_mean_whatever_compresses():
    """18 tokens of blocks of 4, of which 3 are read: the choice of blocks goes by compressed keys."""
    params, tokens = draw_params(DENSE), draw_tokens(DENSE, 2, 18)
    found = {}
    for kind in ("mlp", "linear", "mean"):
        nsa = dataclasses.replace(NSA, compress_kind=kind, compress_width=13)
        changed, new = retrofit(params, DENSE, nsa, gate=0.2)
        assert jax.tree.structure(changed) == jax.tree.structure(abstract_params(new))
        output = run(changed, {"tokens": tokens}, new)
        found[kind] = output.logits, output.chosen_blocks
    for kind in ("mlp", "linear"):
        np.testing.assert_array_equal(found[kind][1], found["mean"][1])
        np.testing.assert_allclose(found[kind][0], found["mean"][0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "mean"])
def test_a_cache_gives_the_logits_of_the_whole_text(kind):
    config = config_of(kind)
    params, tokens = draw_params(config), draw_tokens(config, 2, 17)
    whole = run(params, {"tokens": tokens}, config).logits
    cache, found = init_cache(config, 2, 17), []
    for part in (slice(0, 9), slice(9, 16), slice(16, 17)):  # of which the last is one token alone
        output = run(params, {"tokens": tokens[:, part]}, config, cache=cache)
        cache = output.cache
        found.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-5)


def test_a_linear_map_has_a_matrix_a_token_and_the_mean_has_nothing():
    params = init_params(config_of("linear", compress_init="mean"), jax.random.key(0))
    phi = params["layers"]["attention"]["compress_key"]
    assert {name: x.shape for name, x in phi.items()} == {
        "position": (2, 4, 4),
        "weight": (2, 4, 4, 4),
        "bias": (2, 4),
    }
    np.testing.assert_array_equal(phi["weight"], np.broadcast_to(np.eye(4) / 4, (2, 4, 4, 4)))
    assert "compress_key" not in draw_params(config_of("mean"))["layers"]["attention"]
