"""What is chosen for speed gives what the plain way gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import FullAttentionConfig, forward
from jaxlab.models.full_attention import fastest
from jaxlab.models.layers import project
from tests.models.tiny import draw_params, draw_tokens, make_config


@pytest.mark.parametrize(("x", "kernel", "inputs"), [((2, 3, 4), (4, 5), 1), ((2, 3, 2, 4), (2, 4, 5), 2)])
def test_a_product_of_two_matrices(x, kernel, inputs):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x, kernel))
    plain = lambda x, kernel: jnp.sum(jnp.sin(jnp.tensordot(x, kernel, axes=inputs)))
    ours = lambda x, kernel: jnp.sum(jnp.sin(project(x, kernel, inputs)))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, *(jax.grad(f, (0, 1))(x, kernel) for f in (ours, plain)))
    assert project(x, kernel, inputs).shape == (2, 3, 5)
    assert (
        project(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), inputs, jnp.float32).dtype == jnp.float32
    )


def test_attention_is_chosen_by_device_dtype_and_length():
    assert [fastest(jnp.float32, length) for length in (511, 512, 4096)] == ["xla", "chunked", "chunked"]
    assert fastest(jnp.bfloat16, 4096) == "xla"
    auto = make_config(num_layers=1, max_length=512)
    assert auto.attention.implementation == "auto"
    params, batch = draw_params(auto), {"tokens": draw_tokens(auto, 1, 512)}
    run = jax.jit(forward, static_argnums=2)
    logits = {}
    for name in ("auto", "xla", "chunked"):
        model = dataclasses.replace(auto, attention=FullAttentionConfig(implementation=name))
        logits[name] = np.asarray(run(params, batch, model).logits)
    np.testing.assert_array_equal(logits["auto"], logits["chunked"])
    np.testing.assert_allclose(logits["auto"], logits["xla"], atol=1e-4)
    assert (logits["auto"] != logits["xla"]).any()  # so they are two programs
