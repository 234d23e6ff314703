"""Vision transformers of other families, by hand: what is read, joined, pooled, and what a batch needs.

Whole models are compared with transformers' logits in the golden cases (tests/golden/families).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import (
    AttentionContext,
    ModelConfig,
    ResamplerConfig,
    ViTConfig,
    encode_images,
    forward,
    prepare_batch,
)
from jaxlab.models.full_attention import attention_mask
from jaxlab.models.initializer import bind
from jaxlab.models.vision import connectors
from jaxlab.models.vision.connectors import Projector
from tests.models.tiny import draw_params

IMAGE = 3


def make_config(**vit):
    """Two layers on images of 4 x 4 patches."""
    sizes = dict(num_layers=2, image_size=9, patch_size=2, channels=2, width=8, num_heads=2)
    tower = ViTConfig(**sizes, mlp_width=6, image_token=IMAGE, **vit)
    return ModelConfig(
        vocab_size=13, width=12, num_layers=1, num_heads=2, mlp_width=8, max_length=64, vision=tower
    )


def draw_images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, 2, 9, 9)).astype(np.float32)


def tokens_of(params, config, images):
    return np.asarray(
        jax.jit(encode_images, static_argnames="config")(params, {"images": images}, config).tokens
    )


def text(*parts):
    """Rows of tokens: numbers of placeholders between words."""
    return np.array([[7, *[IMAGE] * n, 8, 9] for n in parts], np.int32)


def test_patches_are_read_row_by_row_and_what_is_left_of_an_image_is_cut_off():
    """A tower that hands its input on: a token is its patch's pixels, by channel, row and column."""
    config = make_config(feature_layers=(0,), final_norm="unused", connector="linear", connector_bias=False)
    params = jax.tree.map(jnp.zeros_like, draw_params(config))
    params["vision"]["patch"]["table"] = jnp.eye(8).reshape(2, 2, 2, 8)
    params["projector"]["output"] = jnp.eye(8, 12)
    images = draw_images(2)
    encoded = tokens_of(params, config, images)
    assert encoded.shape == (2 * 16, 12)
    for image in range(2):
        for row in range(4):
            for column in range(4):
                patch = images[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                token = encoded[16 * image + 4 * row + column]
                np.testing.assert_array_equal(token[:8], patch.reshape(-1))


def test_layers_after_the_last_one_that_is_read_do_not_matter_and_several_are_joined():
    one = make_config(
        feature_layers=(-2,), final_norm="unused", class_token=True, drop_first=True, connector_bias=False
    )
    both = dataclasses.replace(one, vision=dataclasses.replace(one.vision, feature_layers=(1, 0)))
    params, images = draw_params(one), draw_images(1)
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["vision"]["layers"] = jax.tree.map(lambda leaf: leaf.at[1].add(1.0), params["vision"]["layers"])
    changed["vision"]["final_norm"] = jax.tree.map(lambda leaf: leaf + 1, params["vision"]["final_norm"])
    expected = tokens_of(params, one, images)
    assert expected.shape == (16, 12)
    np.testing.assert_array_equal(tokens_of(changed, one, images), expected)
    joined = {**params, "projector": {**params["projector"]}}
    hidden = params["projector"]["hidden"]
    joined["projector"]["hidden"] = jnp.concatenate([hidden, jnp.zeros_like(hidden)])
    np.testing.assert_allclose(tokens_of(joined, both, images), expected, rtol=1e-5, atol=1e-5)


def test_squares_of_features_are_joined_row_by_row_or_averaged():
    features = jnp.arange(2 * 16 * 3, dtype=jnp.float32).reshape(2, 16, 3)
    joined = connectors._shuffle(features, 2)
    assert joined.shape == (2, 4, 12)
    square = features.reshape(2, 4, 4, 3)
    assert joined[1, 2].tolist() == [*square[1, 2, 0], *square[1, 2, 1], *square[1, 3, 0], *square[1, 3, 1]]
    averaged = connectors._pool(features, 2)
    np.testing.assert_allclose(averaged[0, 1], square[0, :2, 2:].mean((0, 1)))
    # Five a side cannot be averaged to two: the last row and column are dropped.
    odd = jnp.arange(25, dtype=jnp.float32).reshape(1, 25, 1)
    assert connectors._pool(odd, 2)[0, :, 0].tolist() == [3.0, 5.0, 13.0, 15.0]


@pytest.mark.parametrize(
    ("vit", "images", "made"),
    [
        ({}, 2, 32),
        ({"class_token": True}, 1, 17),
        ({"class_token": True, "drop_first": True, "shuffle": 2}, 3, 12),
        ({"pooled_side": 2}, 1, 4),
    ],
)
def test_there_are_as_many_placeholders_as_image_tokens(vit, images, made):
    config = make_config(**vit)
    assert prepare_batch({"tokens": text(made), "images": draw_images(images)}, config).keys() == {
        "tokens",
        "images",
    }
    for wrong in (made - 1, made + 1):
        with pytest.raises(
            ValueError, match=f"the text has {wrong} placeholders, its images make {made} tokens"
        ):
            prepare_batch({"tokens": text(wrong), "images": draw_images(images)}, config)


def test_tiles_need_the_sizes_of_images_on_the_host():
    config = make_config(grid=((9, 18), (18, 9)), final_norm="unused")
    tokens = text(16 + 4 * 9)
    batch = {"tokens": tokens, "images": draw_images(1, 4), "image_sizes": np.array([[10, 20]])}
    with pytest.raises(ValueError, match="lacks image_sizes"):
        prepare_batch({"tokens": tokens, "images": batch["images"]}, config)
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 9, 9\), image_sizes ask for \[3\] tiles"):
        prepare_batch({**batch, "images": batch["images"][:, :2]}, config)
    with pytest.raises(ValueError, match="image_sizes is traced; call prepare_batch outside"):
        jax.eval_shape(lambda batch: forward(draw_params(config), batch, config), batch)
    prepared = prepare_batch(batch, config)
    assert prepared["image_tiles"].tolist() == [0, 1, 2]  # the fourth is padding
    assert prepare_batch(prepared, config).keys() == prepared.keys()
    params, run = draw_params(config), jax.jit(forward, static_argnames="config")
    logits = run(params, prepared, config)[0]
    noise = prepared["images"].copy()
    noise[:, 3] = 100
    np.testing.assert_array_equal(run(params, {**prepared, "images": noise}, config)[0], logits)
    changed = {**params, "projector": {**params["projector"], "newline": params["projector"]["newline"] + 1}}
    assert (run(changed, prepared, config)[0] != logits).any()


def test_images_of_zeros_are_none_and_patches_lie_where_they_would_in_a_whole_image():
    config = make_config(position="fractional", shuffle=2)
    images = draw_images(1, 3)
    images[0, 1] = 0
    mask = np.ones((1, 3, 9, 9), np.int64)
    mask[0, 2, 4:], mask[0, 2, :, 5:] = 0, 0  # two rows of patches, and three columns: one pixel is enough
    batch = {"tokens": text(2 * 4), "images": images, "pixel_attention_mask": mask}
    prepared = prepare_batch(batch, config)
    assert prepared["image_tiles"].tolist() == [0, 2]
    assert prepared["image_patch_positions"][0].tolist() == list(range(16))
    # Rows 0 and 1/2 of 4 are rows 0 and 2; columns 0, 1/3, 2/3 are 0, 1, 2.
    assert prepared["image_patch_positions"][1].reshape(4, 4).tolist() == [
        [0, 1, 2, 0],
        [8, 9, 10, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert prepared["image_patch_visible"][1].reshape(4, 4).sum() == 6
    with pytest.raises(ValueError, match="its images make 12 tokens"):
        prepare_batch({**batch, "images": draw_images(1, 3)}, config)


def test_who_sees_whom_both_ways():
    images, prefix = (
        make_config(together="images", pooled_side=1),
        make_config(together="prefix", pooled_side=1),
    )
    tokens = np.array([[IMAGE, 5, IMAGE, 6, 7, IMAGE]], np.int32)
    batch = {"tokens": tokens, "images": draw_images(3)}
    assert prepare_batch(batch, images)["together"].tolist() == [[1, 0, 2, 0, 0, 3]]
    assert prepare_batch(batch, prefix)["together"].tolist() == [[1] * 6]
    types = np.array([[0, 0, 0, 0, 1, 1]])
    assert prepare_batch({**batch, "token_type_ids": types}, prefix)["together"].tolist() == [
        [1, 1, 1, 1, 0, 0]
    ]
    traced = jax.eval_shape(lambda t: prepare_batch({**batch, "tokens": t}, images)["together"], tokens)
    assert (traced.shape, traced.dtype) == ((1, 6), np.int32)


def test_windows_bound_images_of_gemma_3_and_not_prompts_of_paligemma_2():
    together = jnp.asarray([[0, 1, 1, 1, 1, 0]], jnp.int32)
    context = AttentionContext(jnp.arange(6, dtype=jnp.int32)[None], together=together)
    seen = {
        bound: attention_mask(context._replace(together_in_window=bound), 6, window=2)[0].astype(int)
        for bound in (False, True)
    }
    assert seen[False].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert seen[True].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_a_resampler_reads_what_is_visible_and_nothing_else():
    resampler = ResamplerConfig(num_queries=3, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
    config = make_config(connector="resampler", connector_width=4, resampler=resampler)
    projector = bind(draw_params(config)["projector"], Projector, config)
    features = np.random.default_rng(2).standard_normal((2, 5, 8)).astype(np.float32)
    visible = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
    read = lambda features: projector(jnp.asarray(features), visible=jnp.asarray(visible))
    tokens, hidden = read(features), read(np.where(visible[..., None], features, 9.0))
    assert tokens.shape == (2, 3, 12)
    np.testing.assert_allclose(tokens, hidden, rtol=1e-5, atol=1e-6)
    seen = read(np.where(visible[..., None], features + 1.0, features))
    assert np.abs(seen - tokens).min(axis=-1).max() > 1e-4
    alone = projector(jnp.asarray(features[:1, [0, 1, 3]]))  # order does not matter, nor what is not there
    np.testing.assert_allclose(tokens[:1], alone, rtol=1e-4, atol=1e-5)


def test_squares_of_images_that_are_none_are_joined_by_their_rows():
    features = jnp.arange(2 * 24 * 3, dtype=jnp.float32).reshape(2, 24, 3)
    joined, grid = connectors._shuffle(features, 2, rows=4), features.reshape(2, 4, 6, 3)
    assert joined.shape == (2, 6, 12)
    assert joined[1, 4].tolist() == [*grid[1, 2, 2], *grid[1, 2, 3], *grid[1, 3, 2], *grid[1, 3, 3]]


@pytest.mark.parametrize(
    ("vit", "message"),
    [
        (
            {"feature_layers": (3,), "final_norm": "unused"},
            "feature_layers: 3 is no hidden state of 2 layers",
        ),
        ({"feature_layers": (-2,)}, "final_norm: is after the last layer"),
        ({"class_token": True, "shuffle": 2}, "17 features are no square"),
        ({"shuffle": 3}, "4 patches a side cannot be joined by 3"),
        ({"pooled_side": 5}, "exceeds the 4 patches a side"),
        ({"grid": ((9, 9),), "shuffle": 2, "final_norm": "unused"}, "images cut to tiles keep all patches"),
    ],
)
def test_towers_that_cannot_be(vit, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**vit)
