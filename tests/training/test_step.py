"""A training step: the loss by hand, and accumulation that weighs every target the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.losses import evaluate_step
from jaxlab.training.step import State, train_step
from tests.models import oracle
from tests.models.tiny import draw_params, draw_tokens, make_config

CONFIG = make_config(num_layers=1)
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
OPTIMIZER = optax.sgd(1.0)
UPDATE = jax.jit(train_step, static_argnames=("config", "optimizer", "accumulation"))


def loss_by_hand(params, batch):
    total, count = 0.0, 0
    for tokens, mask in zip(np.asarray(batch["tokens"]), batch["loss_mask"], strict=True):
        logits = oracle.logits(params, tokens, CONFIG)
        for t in range(1, len(tokens)):
            if mask[t]:
                total += np.log(np.exp(logits[t - 1]).sum()) - logits[t - 1][tokens[t]]
                count += 1
    return total / count, count


def step(accumulation, mask=MASK):
    params = draw_params(CONFIG)
    batch = {"tokens": draw_tokens(CONFIG, 4, 6), "loss_mask": jnp.asarray(mask)}
    state = State(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))
    state, metrics = UPDATE(state, batch, CONFIG, OPTIMIZER, accumulation)
    return batch, params, state, metrics


def test_loss_is_the_mean_over_targets():
    batch, params, state, metrics = step(1)
    expected, count = loss_by_hand(params, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert int(state.step) == 1
    sums = jax.jit(evaluate_step, static_argnames="config")(params, batch, CONFIG)
    assert float(sums["loss"]) == pytest.approx(expected * count, rel=1e-5)
    assert (float(sums["targets"]), float(sums["rows"])) == (count, 4)
    # With SGD at rate 1 the step is the gradient: its norm is the one that is reported.
    moved = jax.tree.map(
        lambda old, new: np.sum((np.asarray(old) - np.asarray(new)) ** 2), params, state.params
    )
    assert float(metrics["gradient_norm"]) == pytest.approx(np.sqrt(sum(jax.tree.leaves(moved))), rel=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_make_the_gradient_of_the_whole(parts):
    _, _, whole, metrics = step(1)
    _, _, state, in_parts = step(parts)
    for name in ("loss", "gradient_norm"):
        assert float(in_parts[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, whole.params)


def test_a_batch_without_targets_moves_nothing():
    _, params, state, metrics = step(1, np.zeros((4, 6), bool))
    assert float(metrics["loss"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
