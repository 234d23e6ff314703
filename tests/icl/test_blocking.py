"""Blocking of words: what must stay, what must change, and that all settings share one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.icl import Setting, attention_at, blocked_logits, random_words
from jaxlab.icl.blocking import _blocked_logits, blocking_settings, label_predictions, word_loyalty
from jaxlab.models import ModelConfig, forward, init_params

MODEL = ModelConfig(
    vocab_size=19, width=16, num_layers=3, num_heads=2, mlp_width=24, max_length=16, initializer_range=0.4
)
TOKENS, BATCH = 9, 2


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))


def blocked(params, tokens, layers, words, blocking="paper"):
    positions = jnp.full((BATCH,), TOKENS - 1, jnp.int32)
    batch = {"tokens": jnp.asarray(tokens)}
    return np.asarray(
        blocked_logits(params, batch, positions, jnp.asarray(layers), jnp.asarray(words), MODEL, blocking)
    )


@pytest.mark.parametrize("blocking", ["paper", "released_code"])
def test_what_blocking_changes(params, blocking):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (BATCH, TOKENS)).astype(np.int32)
    layers = np.array([[False] * 3, [False, False, True], [True, False, False], [True, True, True]])
    words = np.zeros((4, BATCH, TOKENS), bool)
    words[1:3, :, [3, 5]] = True
    words[3, :, TOKENS - 1] = True
    logits = blocked(params, tokens, layers, words, blocking)
    plain = forward(params, {"tokens": jnp.asarray(tokens)}, MODEL)[0][:, -1]
    np.testing.assert_allclose(logits[0], plain, rtol=1e-4, atol=1e-5)
    # In the last layer only the row of q matters, so blocking other words there changes nothing at all.
    np.testing.assert_array_equal(logits[1], logits[0])
    assert np.max(np.abs(logits[2] - logits[0])) > 0.01
    # q blocked in all layers does not see what stands before it.
    others = tokens.copy()
    others[:, :-1] = (others[:, :-1] + 1) % MODEL.vocab_size
    changed = blocked(params, others, layers, words, blocking)
    if blocking == "released_code":
        np.testing.assert_allclose(changed[3], logits[3], rtol=1e-4, atol=1e-5)
    else:  # without renormalising, the weight that is left on q still depends on the others
        assert np.max(np.abs(changed[3] - logits[3])) > 1e-4
    assert np.max(np.abs(changed[0] - logits[0])) > 0.01


def test_one_program_serves_every_setting(params):
    _blocked_logits.clear_cache()
    tokens = np.ones((BATCH, TOKENS), np.int32)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        blocked(params, tokens, rng.random((4, 3)) < 0.5, rng.random((4, BATCH, TOKENS)) < 0.3)
    assert _blocked_logits._cache_size() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": np.zeros((1, 4), bool)}, r"bool\[E, 3\], a mask over the model's layers .* not \[1, 4\]"),
        ({"words": np.zeros((1, BATCH, 4), bool)}, r"words are bool\[E, B, T\], here \[1, 2, 9\]"),
        ({"blocking": "papers"}, "'papers' is none of paper, released_code"),
        ({"positions": np.full(BATCH, TOKENS)}, r"positions\[0\] = 9 is outside of 0..8"),
    ],
)
def test_mistakes(changes, message):
    given = {
        "batch": {"tokens": np.ones((BATCH, TOKENS), np.int32)},
        "positions": np.full(BATCH, TOKENS - 1),
        "layers": np.zeros((1, 3), bool),
        "words": np.zeros((1, BATCH, TOKENS), bool),
    }
    with pytest.raises(UserError, match=message):
        blocked_logits({}, config=MODEL, **(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": np.array([8, 9])}, r"positions\[1\] = 9 is outside of 0..8"),
        ({"at": np.array([[0], [-2]])}, r"at\[1, 0\] = -2 is outside of -1..8"),
        ({"batch": {"tokens": np.full((BATCH, TOKENS), 19)}}, "the batch holds token 19"),
        ({"batch": {"tokens": np.ones((BATCH, TOKENS), np.int32), "pixel_values": 1}}, "no pixel_values of"),
    ],
)
def test_attention_is_read_at_places_that_are_there(changes, message):
    given = {
        "batch": {"tokens": np.ones((BATCH, TOKENS), np.int32)},
        "positions": np.full(BATCH, TOKENS - 1),
        "at": np.zeros((BATCH, 1), np.int32),
    }
    with pytest.raises(UserError, match=f"attention_at: .*{message}"):
        attention_at({}, config=MODEL, **(given | changes))


def test_settings_name_their_layers():
    grid = blocking_settings([1, 2])
    assert len(grid) == 8
    assert list(Setting("label", "first", 2).layer_mask(3)) == [True, True, False]
    assert list(Setting("label", "last", 1).layer_mask(3)) == [False, False, True]


def test_random_words_are_as_many_and_never_labels():
    rng = np.random.default_rng(0)
    labels = rng.random((50, 12)) < 0.2
    others = ~labels
    others[:, [0, 11]] = False
    words = random_words(np.random.default_rng(7), labels, others)
    assert np.all(words <= others)
    np.testing.assert_array_equal(words.sum(1), np.minimum(labels.sum(1), others.sum(1)))
    np.testing.assert_array_equal(words, random_words(np.random.default_rng(7), labels, others))
    assert np.any(words != random_words(np.random.default_rng(8), labels, others))
    assert words.any(0)[1:11].all(), "every place is drawn at times"


def test_measures():
    logits = np.array([[0.0, 5.0, 4.0, 3.0, 2.0, 1.0], [9.0, 1.0, 2.0, 3.0, 4.0, 8.0]])
    np.testing.assert_array_equal(label_predictions(logits, np.array([[3, 2], [4, 5]])), [1, 1])
    np.testing.assert_array_equal(
        label_predictions(np.stack([logits, -logits]), np.array([[3, 2], [4, 5]])), [[1, 1], [0, 0]]
    )
    np.testing.assert_allclose(word_loyalty(logits, logits, 3), [1.0, 1.0])
    # Top 3 of row 0 are {1, 2, 3}; of the other {3, 4, 5}: 1 in common, 5 in all. Row 1: {0, 5, 4} and {1, 2,
    # 3}.
    other = np.array([[0.0, 0.0, 0.0, 3.0, 2.0, 1.0], [0.0, 9.0, 9.0, 9.0, 4.0, 8.0]])
    np.testing.assert_allclose(word_loyalty(other, logits, 3), [1 / 5, 0.0])
