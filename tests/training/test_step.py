"""A training step: the loss by hand, and accumulation that weighs every target the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.errors import ConfigError
from jaxlab.losses import LossConfig, evaluate_step
from jaxlab.training.step import State, train_step
from tests.models import oracle
from tests.models.tiny import draw_params, draw_tokens, make_config

CONFIG = make_config(num_layers=1)
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
OPTIMIZER = optax.sgd(1.0)
UPDATE = jax.jit(train_step, static_argnames=("config", "optimizer", "accumulation", "loss", "sources"))


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


@pytest.mark.parametrize("parts", [1, 2])
def test_z_loss_and_the_loss_of_each_source(parts):
    params, weight = draw_params(CONFIG), 0.01
    tokens, sources = draw_tokens(CONFIG, 4, 6), np.array([2, 0, 2, 1], np.int32)
    batch = {"tokens": tokens, "loss_mask": jnp.asarray(MASK), "source_ids": jnp.asarray(sources)}
    state = State(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))
    _, metrics = UPDATE(state, batch, CONFIG, OPTIMIZER, parts, loss=LossConfig(weight), sources=4)
    losses, targets, squares = np.zeros(4), np.zeros(4), 0.0
    for row, mask, source in zip(np.asarray(tokens), MASK, sources, strict=True):
        logits = oracle.logits(params, row, CONFIG)
        for t in range(1, len(row)):
            if mask[t]:
                normaliser = np.log(np.exp(logits[t - 1]).sum())
                losses[source] += normaliser - logits[t - 1][row[t]]
                targets[source] += 1
                squares += normaliser**2
    np.testing.assert_allclose(metrics["source_losses"], losses, rtol=1e-5)
    np.testing.assert_array_equal(metrics["source_targets"], targets)
    assert float(metrics["z_loss"]) == pytest.approx(squares / targets.sum(), rel=1e-5)
    expected = (losses.sum() + weight * squares) / targets.sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ConfigError, match="negative"):
        LossConfig(z_loss=-1e-4)
