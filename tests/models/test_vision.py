"""Images: which pixels make which patch, where image tokens go, and what learns from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import forward, language_model
from jaxlab.models.vision.encoders import encode_images
from jaxlab.models.vision.placeholders import place_images
from tests.models.tiny import VISION, draw_params, draw_tokens, make_config

IMAGE = VISION.image_token


def draw_images(batch, count, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((batch, count, 4, 4, 2)), jnp.float32)


def test_patches_are_read_row_by_row():
    """A tower that hands its input on: a patch's token is its pixels, by row, column and channel."""
    config = make_config("vision")
    params = draw_params(config)
    zero = jax.tree.map(jnp.zeros_like, params["vision"])
    # Zero weights make every layer the identity; the norm then only scales what the patch projection made.
    identity = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    vision = {**zero, "final_norm": identity, "patch": {"table": jnp.eye(8), "bias": jnp.zeros(8)}}
    hidden = jnp.pad(100 * jnp.eye(8), ((0, 0), (0, 4)))  # a GELU far from zero is a ReLU
    output = jnp.eye(12)
    projector = {
        "hidden": hidden,
        "hidden_bias": jnp.zeros(12),
        "output": output,
        "output_bias": jnp.zeros(12),
    }
    images = draw_images(1, 2)
    found = encode_images({"vision": vision, "projector": projector}, {"images": images}, config).tokens[0]
    assert found.shape == (8, 12)
    for image in range(2):
        for row in range(2):
            for column in range(2):
                patch = images[0, image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                pixels = np.array([patch[i, j, c] for i in range(2) for j in range(2) for c in range(2)])
                normed = (pixels - pixels.mean()) / np.sqrt(pixels.var() + 1e-6)
                token = found[4 * image + 2 * row + column]
                np.testing.assert_allclose(token[:8], 100 * np.maximum(normed, 0), rtol=1e-3, atol=1e-2)


def test_the_kth_placeholder_takes_the_kth_image_token():
    x = jnp.arange(8, dtype=jnp.float32).reshape(1, 8, 1)
    tokens = jnp.asarray([[9, IMAGE, 9, IMAGE, IMAGE, 9, IMAGE, 9]], jnp.int32)
    patches = jnp.asarray([[[100.0], [200.0], [300.0]]])
    placed = place_images(x, tokens, patches, IMAGE)[0, :, 0]
    assert placed.tolist() == [0, 100, 2, 200, 300, 5, 6, 7]  # the fourth finds none and stays a word


def test_images_of_a_row_reach_that_row_and_every_part_learns():
    config = make_config("vision")
    params = draw_params(config)
    tokens = jnp.concatenate([jnp.full((2, 4), IMAGE, jnp.int32), draw_tokens(config, 2, 3)], axis=1)
    images = draw_images(2, 1)

    def loss(params, images):
        return jnp.sum(jnp.sin(forward(params, {"tokens": tokens, "images": images}, config)[0][0]))

    value_and_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (of_params, of_images) = value_and_gradients(params, images)
    assert (of_images[0] != 0).any()
    assert (of_images[1] == 0).all()  # the loss reads row 0 only
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # A key bias adds the same to all scores of a query: the softmax does not feel it.
        assert (jnp.max(jnp.abs(leaf)) > 1e-4) == (name != "vision.layers.attention.key_bias"), name
    changed = value_and_gradients(params, images.at[0, 0, 3, 3, 1].add(1.0))[0]
    assert abs(changed - value) > 1e-4


def test_a_batch_of_text_does_not_need_the_tower():
    config = make_config("vision")
    params, batch = draw_params(config), {"tokens": draw_tokens(config, 1, 5)}
    run = jax.jit(forward, static_argnames="config")
    np.testing.assert_array_equal(
        run(params, batch, config)[0], run(language_model(params), batch, config.language)[0]
    )


def test_the_tower_sees_the_whole_image():
    """Attention is not causal there: the last patch changes the first one's token."""
    config = make_config("vision")
    params, images = draw_params(config), draw_images(1, 2)
    encode = jax.jit(encode_images, static_argnames="config")
    before, after = (
        encode(params, {"images": x}, config).tokens[0] for x in (images, images.at[0, 0, 3, 3].add(1.0))
    )
    assert (np.abs(before[:4] - after[:4]).max(axis=1) > 1e-4).all()
    np.testing.assert_array_equal(before[4:], after[4:])  # images do not see each other


def test_images_of_another_size_are_refused():
    config = make_config("vision")
    with pytest.raises(ValueError, match=r"images are \(5, 4, 2\), the model takes \(4, 4, 2\)"):
        encode_images(draw_params(config), {"images": jnp.zeros((1, 1, 5, 4, 2))}, config)
