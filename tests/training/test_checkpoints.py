"""Checkpoints of a run: damaged ones are passed by, what is not finite is not saved, nothing is left over."""

import errno
import logging
import os
import shutil
import threading
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoints import save_tree
from jaxlab.errors import UserError
from jaxlab.training import Checkpoints, KeepConfig, State
from jaxlab.training import checkpoints as module


def state_of(step, value=1.5):
    params = {"a": {"b": jnp.arange(4096, dtype=jnp.float32) * value}, "c": jnp.ones((3,), jnp.bfloat16)}
    return State(jnp.asarray(step, jnp.int32), params, (jnp.zeros((2,)), jnp.asarray(step, jnp.int32)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = Checkpoints(tmp_path_factory.mktemp("saved") / "checkpoints")
    for step in (2, 4, 6):
        made.save(step, state_of(step))
    return made.folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return Checkpoints(tmp_path / "checkpoints")


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, count=64, seed=0):
    raw = bytearray(path.read_bytes())
    for place in np.random.default_rng(seed).integers(0, len(raw), count):
        raw[place] ^= 0x55
    path.write_bytes(raw)


DAMAGE = {
    "flipped bytes": lambda folder: flip(largest_file(folder)),
    "one flipped bit": lambda folder: flip(largest_file(folder), 1),
    "cut off": lambda folder: os.truncate(largest_file(folder), largest_file(folder).stat().st_size - 7),
    "emptied": lambda folder: largest_file(folder).write_bytes(b""),
    "a file gone": lambda folder: largest_file(folder).unlink(),
    "no metadata": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "no digests": lambda folder: (folder / "state" / "digests.json").unlink(),
    "digests that are no JSON": lambda folder: (folder / "state" / "digests.json").write_bytes(b"\xff{"),
    "digests of another form": lambda folder: (folder / "state" / "digests.json").write_text(
        '{"sha256": [1]}'
    ),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "an empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_by_and_named(checkpoints, damage):
    DAMAGE[damage](checkpoints.folder / "6")
    with pytest.warns(UserWarning, match=r"checkpoints/6: damaged, and passed by: its? ") as notes:
        step, state = checkpoints.restore(state_of(0))
    assert len(notes) == 1
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))


def test_a_damaged_one_is_replaced(checkpoints):
    flip(largest_file(checkpoints.folder / "6"))
    checkpoints.save(6, state_of(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.restore(state_of(0))[0] == 6


def test_none_is_whole(checkpoints):
    for step in checkpoints.steps():
        flip(largest_file(checkpoints.folder / str(step)))
    with pytest.warns(UserWarning, match="damaged") as notes:
        assert checkpoints.restore(state_of(0)) is None
    assert len(notes) == 2


def test_the_newest_two_stay_and_leftovers_of_a_kill_go(checkpoints):
    assert checkpoints.steps() == [6, 4]
    (checkpoints.folder / ".8.partial" / "state").mkdir(parents=True)
    (checkpoints.folder / ".2.old.partial").mkdir()
    (checkpoints.folder / "notes").mkdir()  # not ours
    again = Checkpoints(checkpoints.folder)
    assert sorted(path.name for path in again.folder.iterdir()) == ["4", "6", "notes"]


def test_a_newer_damaged_one_does_not_push_out_whole_ones(checkpoints):
    flip(largest_file(checkpoints.folder / "6"))
    checkpoints.save(5, state_of(5))
    assert checkpoints.steps() == [6, 5, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(checkpoints, value):
    with pytest.raises(UserError, match=r"params\.a\.b is not finite after step 8.*checkpoint is of step 6"):
        checkpoints.save(8, state_of(8, value))
    assert checkpoints.steps() == [6, 4]


def test_what_stands_in_the_way_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints: cannot be written: File exists"):
        Checkpoints(tmp_path / "checkpoints")


def test_a_whole_checkpoint_of_another_state_is_one_line(checkpoints):
    other = state_of(0)._replace(params={"a": jnp.zeros((3,))})
    with pytest.raises(UserError, match="checkpoints/6/state: the parameters cannot be read"):
        checkpoints.restore(other)


def test_which_ones_stay(tmp_path):
    kept = {}
    policies = {"last": KeepConfig(last=1), "every": KeepConfig(last=1, every=4), "best": KeepConfig(best=2)}
    losses = {2: 3.0, 4: 1.0, 8: 2.0, 10: 5.0}
    for name, keep in policies.items():
        made = Checkpoints(tmp_path / name, keep)
        for step in range(2, 16, 2):
            made.folder.joinpath(str(step)).mkdir()
            for old in made._superfluous(step, losses):
                made._remove(old)
        kept[name] = made.steps()
    assert kept == {"last": [14], "every": [14, 12, 8, 4], "best": [14, 12, 8, 4]}


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    save_tree = module.save_tree

    def slowly(folder, tree):
        begun.set()
        assert go_on.wait(60)
        save_tree(folder, tree)

    monkeypatch.setattr(module, "save_tree", slowly)
    made, state = Checkpoints(tmp_path / "checkpoints"), state_of(3)
    made.save(3, state, background=True)
    assert begun.wait(60)
    assert made.steps() == []
    # The next step takes over the memory of the state.
    after = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    made.check()  # says nothing: it is not done
    go_on.set()
    step, restored = made.restore(jax.tree.map(jnp.copy, after))  # waits for it
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(3))


@pytest.mark.parametrize("noticed_by", ["check", "wait", "save", "restore"])
def test_what_fails_in_the_background_is_said_once(tmp_path, monkeypatch, noticed_by):
    made = Checkpoints(tmp_path / "checkpoints")

    def full(folder, tree):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_tree", full)
    made.save(3, state_of(3), background=True)
    made._pending.join()
    notice = {
        "check": made.check,
        "wait": made.wait,
        "save": lambda: made.save(4, state_of(4)),
        "restore": lambda: made.restore(state_of(0)),
    }[noticed_by]
    with pytest.raises(UserError, match=r"checkpoints/3: cannot be written: No space left.*; make room"):
        notice()
    made.wait()
    assert list(made.folder.iterdir()) == []


def test_the_traceback_of_a_thread_of_orbax_is_left_out(tmp_path, caplog):
    def write(self, *_):
        try:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        except ValueError:
            logging.getLogger("absl").error("in a thread", exc_info=True)
            logging.getLogger("absl").error("said")
            raise

    with (
        mock.patch("orbax.checkpoint.StandardCheckpointer.save", write),
        pytest.raises(UserError, match="cannot be written: No space left; make room there"),
    ):
        save_tree(tmp_path / "state", {})
    assert [record.message for record in caplog.records] == ["said"]
    logging.getLogger("absl").error("later", exc_info=True)
    assert caplog.records[-1].message == "later"
