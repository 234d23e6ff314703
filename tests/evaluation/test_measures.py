"""What is read off logits, by hand."""

import jax.numpy as jnp
import numpy as np

from jaxlab.evaluation import held_out
from jaxlab.losses import exact_match, target_losses
from jaxlab.models import ModelConfig

TOKENS = jnp.asarray([[0, 1, 2, 1], [2, 2, 0, 0]], jnp.int32)


def test_losses_are_those_of_the_next_token():
    probabilities = np.full((2, 4, 3), 1 / 3)
    probabilities[0, 1] = [0.5, 0.25, 0.25]  # token 2 of row 0 follows position 1
    losses, mask = target_losses(jnp.log(jnp.asarray(probabilities, jnp.float32)), {"tokens": TOKENS})
    np.testing.assert_allclose(losses[0], np.log([3, 4, 3]), rtol=1e-6)
    assert mask.all()


def test_targets_are_masked_tokens_that_follow_one_of_their_segment():
    logits = jnp.zeros((2, 4, 3), jnp.float32)
    batch = {
        "tokens": TOKENS,
        "loss_mask": jnp.asarray([[1, 1, 0, 1], [1, 1, 1, 1]], bool),
        "segment_ids": jnp.asarray([[1, 1, 2, 2], [3, 3, 0, 0]], jnp.int32),
    }
    _, mask = target_losses(logits, batch)
    assert mask.tolist() == [[True, False, True], [True, False, False]]
    del batch["segment_ids"]
    _, mask = target_losses(logits, batch)
    assert mask.tolist() == [[True, False, True], [True, True, True]]


def test_a_row_matches_if_all_its_targets_do():
    guesses = jnp.asarray([[1, 2, 1, 0], [2, 1, 0, 0]], jnp.int32)  # row 1 gets its token 2 wrong
    logits = jnp.eye(3, dtype=jnp.float32)[guesses]
    mask = np.ones((2, 4), bool)
    assert exact_match(logits, {"tokens": TOKENS, "loss_mask": jnp.asarray(mask)}).tolist() == [True, False]
    mask[1, 2] = False  # the wrong one is no target
    assert exact_match(logits, {"tokens": TOKENS, "loss_mask": jnp.asarray(mask)}).tolist() == [True, True]
    mask[0] = False  # nothing was asked
    assert exact_match(logits, {"tokens": TOKENS, "loss_mask": jnp.asarray(mask)}).tolist() == [False, True]


def test_positions_are_those_in_a_token_s_own_text(monkeypatch):
    """Two texts in a row: the second one's tokens count from its own start."""
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], jnp.int32)
    losses = jnp.asarray([[1.0, 2, 9, 3, 9], [4, 5, 6, 7, 8]])
    mask = jnp.asarray([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
    monkeypatch.setattr(held_out, "forward", lambda *_: (None, {}))
    monkeypatch.setattr(held_out, "target_losses", lambda *_: (losses, mask))
    monkeypatch.setattr(held_out, "exact_match", lambda *_: mask[:, 0])
    batch = {"tokens": jnp.zeros_like(segments), "segment_ids": segments}
    loss, count, _, _ = held_out.measure_batch.__wrapped__({}, batch, ModelConfig())
    assert loss.tolist() == [1 + 3 + 4, 2 + 5, 6, 7, 8]
    assert count.tolist() == [3, 2, 1, 1, 1]
    loss, count, _, _ = held_out.measure_batch.__wrapped__({}, {"tokens": batch["tokens"]}, ModelConfig())
    assert loss.tolist() == [5, 7, 6, 10, 8]  # of rows that are one text each
    assert count.tolist() == [2, 2, 1, 2, 1]
