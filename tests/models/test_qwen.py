"""Towers of Qwen2-VL to Qwen3-VL, by hand: where patches and tokens stand, who sees whom, what a batch needs.

Whole models are compared with transformers' logits in tests/checkpoints/test_qwen_vl.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import (
    ModelConfig,
    QwenVisionConfig,
    RopeConfig,
    abstract_params,
    forward,
    init_cache,
    prepare_batch,
)
from jaxlab.models.sharding import MeshConfig, make_mesh, param_shardings
from jaxlab.models.vision import qwen_positions
from jaxlab.models.vision.encoders import encode_images
from tests.models.tiny import draw_params

IMAGE = 3


def make_config(**qwen):
    """Patches of 1 x 1 pixel, two frames and two channels; four of them make a token."""
    sizes = dict(num_layers=2, patch_size=1, channels=2, width=8, num_heads=2, mlp_width=6)
    vision = QwenVisionConfig(**sizes, image_token=IMAGE, **qwen)
    return ModelConfig(
        vocab_size=13,
        width=12,
        num_layers=2,
        num_heads=2,
        mlp_width=8,
        max_length=64,
        position=RopeConfig(sections=(1, 1, 1)),
        vision=vision,
    )


def make_batch(*rows, sizes, seed=0, **more):
    """Rows of words and numbers of placeholders; sizes of images in patches."""
    tokens = [
        [t for part in row for t in ([IMAGE] * part[0] if isinstance(part, list) else [part])] for row in rows
    ]
    count = sum(height * width for height, width in sizes)
    images = np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)
    grids = np.array([(1, *size) for size in sizes])
    return {"tokens": np.array(tokens, np.int32), "images": images, "image_grid_thw": grids, **more}


def test_positions_of_text_with_images_in_the_middle():
    batch = make_batch([7, [6], 8, 9, [2]], [5, 5, [4], 5, 5, 5, 5, 5], sizes=[(4, 6), (4, 2), (4, 4)])
    positions = prepare_batch(batch, make_config())["positions"]
    assert positions.dtype == np.int32
    # The first image begins at 1; it has 2 x 3 tokens, so that the word after it stands at 1 + 3.
    first = [
        (0, 0, 0),
        (1, 1, 1),
        (1, 1, 2),
        (1, 1, 3),
        (1, 2, 1),
        (1, 2, 2),
        (1, 2, 3),
        (4, 4, 4),
        (5, 5, 5),
    ]
    assert [tuple(p) for p in positions[0].tolist()] == [*first, (6, 6, 6), (6, 7, 6)]
    image = [(2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3)]
    words = [(n, n, n) for n in (4, 5, 6, 7, 8)]
    assert [tuple(p) for p in positions[1].tolist()] == [(0, 0, 0), (1, 1, 1), *image, *words]


def test_rows_of_text_count_on_and_padding_does_not_count():
    segments = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.int32)
    batch = make_batch([[1], 7, 8, 9, 0], [7, 7, 7, 7, 7], sizes=[(2, 2)], segment_ids=segments)
    positions = prepare_batch(batch, make_config())["positions"]
    assert positions[0].tolist() == [[0] * 3, [1] * 3, [2] * 3, [3] * 3, [0] * 3]
    assert positions[1].tolist() == [[n] * 3 for n in range(5)]
    # A model whose positions have one coordinate keeps them.
    plain = dataclasses.replace(make_config(), position=RopeConfig())
    assert "positions" not in prepare_batch(batch, plain)


def test_patches_lie_square_by_square_and_windows_begin_at_the_top_left():
    rows, columns = qwen_positions.places(np.array([[2, 4], [4, 6]]), merge=2)
    assert list(zip(rows[:8].tolist(), columns[:8].tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
    ]
    images = np.repeat(np.arange(2, dtype=np.int32), [8, 24])
    windows = qwen_positions.windows(images, rows, columns, side=4)
    # The first image fills half a window; the second one is a window, and half of one to its right.
    assert windows.tolist() == [0] * 8 + [1] * 8 + [2] * 4 + [1] * 8 + [2] * 4


def test_groups_of_patches_are_rows_and_return():
    cut = qwen_positions.cut(np.array([0, 0, 2, 1, 2, 2], np.int32))
    assert cut.rows.tolist() == [[0, 1, 0], [3, 0, 0], [2, 4, 5]]
    assert cut.filled.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert cut.rows.reshape(-1)[cut.order].tolist() == [0, 1, 2, 3, 4, 5]


def test_learned_positions_are_stretched_corner_to_corner():
    rows, columns = qwen_positions.places(np.array([[4, 2]]), merge=2)
    index, weights = qwen_positions.corners(np.array([[4, 2]] * 8), rows, columns, side=3)
    table = np.arange(9.0).reshape(3, 3)  # linear in both directions: interpolation is exact
    found = (table.reshape(-1)[index] * weights).sum(axis=1)
    expected = [3 * row * 2 / 3 + column * 2 for row, column in zip(rows, columns, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert index.dtype == np.int32
    assert weights.dtype == np.float32


@pytest.mark.parametrize(
    ("qwen", "seen"),
    [
        ({}, "image"),
        ({"window": 4, "norm": "rms", "mlp": "gated"}, "window"),
        ({"window": 4, "full_layers": (1,)}, "image"),
    ],
)
def test_a_patch_reaches_its_window_or_its_image_and_no_other(qwen, seen):
    """Two images; the first is two windows of 4 x 4 patches side by side."""
    config = make_config(**qwen)
    params = draw_params(config)
    batch = prepare_batch(make_batch([7, [8], 8, [1]], sizes=[(4, 8), (2, 2)]), config)
    encode = jax.jit(encode_images, static_argnames="config")
    before = encode(params, batch, config).tokens
    assert before.shape == (9, 12)
    changed = {**batch, "images": batch["images"].copy()}
    changed["images"][0] += 1.0
    difference = np.abs(encode(params, changed, config).tokens - before).max(axis=1)
    # Tokens are numbered row by row: 0, 1, 4 and 5 lie in the first window.
    reached = {"image": set(range(8)), "window": {0, 1, 4, 5}}[seen]
    assert {i for i in range(9) if difference[i] > 1e-4} == reached
    assert all(difference[i] == 0 for i in range(9) if i not in reached)


@pytest.mark.slow
def test_every_part_learns():
    """Of a tower with all of Qwen3-VL's parts."""
    config = make_config(patch_bias=True, position_side=3, deep_layers=(1, 0))
    drawn = draw_params(config)
    params = {name: drawn[name] for name in ("vision", "projector")}
    batch = prepare_batch(make_batch([7, [2], 8, 9], sizes=[(2, 4)]), config)

    def loss(params):
        encoded = encode_images(params, batch, config)
        assert encoded.deep.shape == (2, 2, 12)
        return jnp.sum(jnp.sin(encoded.tokens)) + jnp.sum(jnp.sin(encoded.deep))

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert jnp.max(jnp.abs(leaf)) > 1e-5, name


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batch([7, [3], 8], sizes=[(2, 4)]), "the text has 3 placeholders, its images make 2 tokens"),
        (
            make_batch([[1], 7, [3]], sizes=[(2, 4), (2, 4)]),
            "an image of 1 x 2 tokens has 1 placeholders in its place",
        ),
        (make_batch([[2]], [[2]], sizes=[(4, 4)]), "an image of 2 x 2 tokens has 2 placeholders"),
        (make_batch([[1]], sizes=[(2, 3)]), "rows and columns must be multiples of 2"),
        (make_batch([7], sizes=[]), "image_grid_thw is empty"),
        (
            {**make_batch([[2]], sizes=[(2, 4)]), "images": np.zeros((9, 4), np.float32)},
            r"images are \(9, 4\), image_grid_thw asks for patches \(8, 4\)",
        ),
        (make_batch([[2]], sizes=[(2, 4)], video_grid_thw=np.ones((1, 3))), "videos are not supported"),
        (
            {**make_batch([[2]], sizes=[(2, 4)]), "image_grid_thw": np.array([[2, 2, 2]])},
            "an image of several frames: videos are not supported",
        ),
        (
            make_batch([[2], 7], sizes=[(2, 4)], segment_ids=np.array([[1, 1, 2]])),
            "packed sequences cannot hold images",
        ),
        (
            make_batch([7, [2]], sizes=[(2, 4)], segment_ids=np.array([[1, 1, 0]])),
            "padding holds placeholders",
        ),
        (
            {"tokens": np.full((1, 2), IMAGE), "images": np.zeros((8, 4), np.float32)},
            "the batch lacks image_grid_thw",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_line(batch, message):
    with pytest.raises(ValueError, match=message) as error:
        prepare_batch(batch, make_config())
    assert "\n" not in str(error.value)


def test_sizes_must_be_known_before_a_forward_is_traced():
    config, batch = make_config(), make_batch([[2]], sizes=[(2, 4)])
    with pytest.raises(ValueError, match="image_grid_thw is traced; call prepare_batch outside of jit"):
        jax.eval_shape(lambda params, batch: forward(params, batch, config), draw_params(config), batch)
    prepared = prepare_batch(batch, config)
    assert prepare_batch(prepared, config).keys() == prepared.keys()
    jax.eval_shape(lambda params, batch: forward(params, batch, config), draw_params(config), prepared)


def test_images_go_on_from_what_the_cache_holds():
    """A conversation read in two turns, each with an image, is the same read at once."""
    config = make_config()
    params, run = draw_params(config), jax.jit(forward, static_argnames="config")
    turn, words, ones = [7, [4], 8], [5] * 6, np.ones((2, 6), np.int32)
    first = make_batch(turn, words, sizes=[(4, 4)], segment_ids=ones)
    second = make_batch(turn, words, sizes=[(4, 4)], seed=1, segment_ids=np.array([[1] * 6, [0] * 6]))
    both = make_batch(turn * 2, words * 2, sizes=[(4, 4)] * 2)
    both["images"] = np.concatenate([first["images"], second["images"]])
    both = prepare_batch(both, config)
    expected = run(params, both, config)[0]
    cache, read = init_cache(config, 2, 12), []
    for batch in (first, second):
        logits, intermediates = run(params, prepare_batch(batch, config), config, cache=cache)
        cache = intermediates["cache"]
        read.append(logits)
    np.testing.assert_allclose(jnp.concatenate(read, axis=1)[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(read[0][1], expected[1, :6], atol=2e-5)
    # Each image takes 2 positions for 4 tokens; the row of text had nothing in the second turn.
    assert cache.length.tolist() == [12, 6]
    assert cache.offset.tolist() == [-4, 0]


@pytest.mark.parametrize(
    ("qwen", "message"),
    [
        ({"merge": 0}, "merge"),
        ({"window": 1}, "1 pixels hold no token"),
        ({"full_layers": (0,)}, "without windows"),
        ({"window": 2, "full_layers": (2,)}, "2 is none of 2 layers"),
        ({"deep_layers": (0, 0)}, "names a layer twice"),
    ],
)
def test_towers_that_cannot_be(qwen, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**qwen)


@pytest.mark.parametrize("qwen", [{"window": 4, "norm": "rms"}, {"position_side": 3, "deep_layers": (0,)}])
def test_activations_have_the_compute_dtype(qwen):
    config = dataclasses.replace(make_config(**qwen), compute_dtype="bfloat16")
    batch = prepare_batch(make_batch([[2]], sizes=[(2, 4)]), config)
    made = jax.eval_shape(lambda params: encode_images(params, batch, config), abstract_params(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("bfloat16")}


def test_every_parameter_can_be_placed_on_devices():
    config = make_config(patch_bias=True, position_side=3, deep_layers=(1, 0))
    shardings = param_shardings(config, make_mesh(MeshConfig()))
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract_params(config))
