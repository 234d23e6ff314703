"""Updates that are left out, and runs that go back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.app.runs import Run, read_metrics
from jaxlab.checkpoints import load_model
from jaxlab.config import build
from jaxlab.errors import UserError
from jaxlab.tasks import train
from jaxlab.training.spikes import Rollbacks, SpikesConfig, skip_spikes, skipped

CONFIG = SpikesConfig(action="skip", sigmas=4.0, window=8)


def test_an_update_that_is_a_spike_is_left_out():
    with jax.numpy_dtype_promotion("standard"):  # optax, as in train_step
        check_skipping()


def check_skipping():
    params = {"w": jnp.ones((3,))}
    rng = np.random.default_rng(0)
    plain, guarded = optax.adam(0.1), skip_spikes(optax.adam(0.1), CONFIG)
    state, expected = guarded.init(params), plain.init(params)
    ours, theirs = params, params
    update = jax.jit(guarded.update)
    for step in range(20):
        grads = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
        loss = jnp.float32(2.0 + 0.1 * rng.normal())
        times = lambda factor, w=grads["w"]: {"w": w * factor}
        spike = {12: (grads, 9.0), 15: (times(1000), 2.0), 17: (times(jnp.nan), 2.0)}
        for bad, its_loss in [spike[step]] if step in spike else []:
            updates, state = update(bad, state, ours, loss=jnp.float32(its_loss))
            assert not any(np.asarray(updates["w"]))
        updates, state = update(grads, state, ours, loss=loss)
        ours = optax.apply_updates(ours, updates)
        updates, expected = plain.update(grads, expected, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert skipped(state) == (3, 0)
    # As if the spikes had never been: parameters, moments and count.
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(same, (ours, state.inner), (theirs, expected))


def test_nothing_is_far_before_half_of_the_window_is_there():
    optimizer = skip_spikes(optax.sgd(0.1), CONFIG)
    params = {"w": jnp.ones((2,))}
    state = optimizer.init(params)
    for loss in (1.0, 50.0, 2.0):
        _, state = optimizer.update(params, state, params, loss=jnp.float32(loss))
    assert skipped(state) == (0, 0)
    for in_a_row in (1, 2):
        _, state = optimizer.update(params, state, params, loss=jnp.float32(np.inf))
        assert skipped(state) == (in_a_row, in_a_row)


def test_batches_are_passed_by(tmp_path):
    rollbacks = Rollbacks(tmp_path / "rollbacks.json")
    rollbacks.add(4, 7)
    rollbacks.add(8, 9)
    again = Rollbacks(tmp_path / "rollbacks.json")
    assert [again.batch_of(step) for step in (0, 3, 4, 7, 8)] == [0, 3, 7, 10, 12]
    (tmp_path / "rollbacks.json").write_text("{")
    with pytest.raises(UserError, match=r"rollbacks\.json: damaged"):
        Rollbacks(tmp_path / "rollbacks.json")


POISON = 7
"""The batch whose gradient is not finite."""


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """Runs with an action; returns the results, the metrics and the numbers of the batches read."""
    (tmp_path / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(200)))
    read = []
    from jaxlab.data.text import TextSource

    batch = TextSource.batch

    def poisoned(self, seed, step, size, rows=None):
        made = batch(self, seed, step, size, rows)
        read.append(step)
        tokens = made["tokens"]
        return {**made, "tokens": np.full_like(tokens, 255) if step == POISON else tokens}

    step = train.train_step

    def bad_at_poison(state, batch, config, optimizer, **options):
        bad = jnp.all(batch["tokens"] == 255)
        params = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, 1.0) * x, state.params)
        wrong, metrics = step(state._replace(params=params), batch, config, optimizer, **options)
        if hasattr(wrong.optimizer, "inner"):  # the update was left out, and these are the poisoned ones
            whole = jax.tree.map(lambda x, y: jnp.where(bad, y, x), wrong.params, state.params)
            wrong = wrong._replace(params=whole)
        return wrong, metrics

    monkeypatch.setattr(TextSource, "batch", poisoned)
    monkeypatch.setattr(train, "train_step", bad_at_poison)

    def run(action, name="run"):
        config = build(
            train.Config,
            {
                "model": {"width": 8, "num_layers": 1, "num_heads": 2, "mlp_width": 8, "max_length": 8},
                "data": {"path": str(tmp_path / "text.py"), "sequence_length": 8, "holdout_every": 4},
                "optimizer": {"warmup_steps": 2},
                "mesh": {"data": 1},
                "spikes": {"action": action},
                "steps": 14,
                "batch_size": 4,
                "log_every": 5,
                "eval_every": 50,
                "eval_batches": 1,
                "checkpoint_every": 6,
            },
        )
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        read.clear()
        return train.run(config, Run(folder, name)), read_metrics(folder), [n for n in read[1:]]

    run.folder = tmp_path / "run"
    return run


@pytest.mark.slow
def test_stop_keeps_the_last_whole_checkpoint(run_with):
    with pytest.raises(UserError, match=r"nan at step 10; set spikes\.action.*is of step 6"):
        run_with("stop")
    assert [path.name for path in (run_with.folder / "checkpoints").iterdir()] == ["6"]


@pytest.mark.slow
def test_skip_leaves_one_update_out(run_with):
    results, metrics, read = run_with("skip")
    assert results["skipped_updates"] == 1
    assert read == list(range(14))
    assert [m["skipped_updates"] for m in metrics if "skipped_updates" in m] == [0, 1, 1]
    _, params, _ = load_model(run_with.folder / "model")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_rollback_goes_on_with_other_batches(run_with):
    results, metrics, read = run_with("rollback")
    assert results["rollbacks"] == 1
    # Seen where step 10 is logged: back to step 6, whose batch is now number 10.
    assert read == [*range(10), *range(10, 18)]
    assert next((m["step"], m["rollback_from"]) for m in metrics if "rollback_from" in m) == (6, 10)
    assert json.loads((run_with.folder / "rollbacks.json").read_text()) == [{"to": 6, "batches": 4}]
